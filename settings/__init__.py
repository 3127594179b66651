# SPDX-License-Identifier: Apache-2.0
"""What a run is told: fields, rules, and all numbers that follow from them. Imports no JAX."""
