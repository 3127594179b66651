# SPDX-License-Identifier: Apache-2.0
"""Stands in for PyTorch in the path of a program: training's environment has none.

TensorBoardX would load it, if it is there, which takes seconds.
"""

raise ImportError('the environment that runs are made in has no PyTorch')
