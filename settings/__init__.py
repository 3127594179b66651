# SPDX-License-Identifier: Apache-2.0
"""The configuration of a run: fields, rules, and all numbers that follow. Imports no JAX."""
