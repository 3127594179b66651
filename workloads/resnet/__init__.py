# SPDX-License-Identifier: Apache-2.0
"""ResNet-50 v1.5 on ImageNet, and its small siblings."""
