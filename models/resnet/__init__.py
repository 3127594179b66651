# SPDX-License-Identifier: Apache-2.0
"""ResNet v1.5."""
