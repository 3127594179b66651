# SPDX-License-Identifier: Apache-2.0
"""The networks, as Flax modules."""
