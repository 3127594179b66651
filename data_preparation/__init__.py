# SPDX-License-Identifier: Apache-2.0
"""Turns public data into TFDS ArrayRecord datasets, and checks that they are whole.

One module per dataset, `verify` for all of them, and the command line in `__main__`:
`python -m data_preparation NAME` prepares and `python -m data_preparation verify NAME` checks.
Nothing here needs TensorFlow, and training imports nothing from here.
"""
