# SPDX-License-Identifier: Apache-2.0
"""The data sets by name. Imports nothing, so that rules and command lines can read it anywhere."""

EVAL_SPLIT = {'digits': 'test', 'cifar10': 'test', 'imagenet2012': 'validation'}
ALIASES = {'imagenet': 'imagenet2012'}
