# SPDX-License-Identifier: Apache-2.0
"""Studies, run when a document needs them."""
