# SPDX-License-Identifier: Apache-2.0
"""What is made of finished runs: reference points, submissions, reports. Nothing here trains."""
