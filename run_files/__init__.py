# SPDX-License-Identifier: Apache-2.0
"""What a run writes for people and checkers: its log, metrics, records."""
