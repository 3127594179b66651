# SPDX-License-Identifier: Apache-2.0
"""Llama 3.1 8B: pre-training of a language model, judged by its loss on held-out text."""
