# SPDX-License-Identifier: Apache-2.0
"""A run: the contract with a workload, the loop, evaluation, checkpoints, processes."""
