# SPDX-License-Identifier: Apache-2.0
"""How fast it is, beside others."""
