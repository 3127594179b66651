# SPDX-License-Identifier: Apache-2.0
"""The benchmarks, each a folder behind the contract of training/workload.py."""
