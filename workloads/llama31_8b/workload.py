# SPDX-License-Identifier: Apache-2.0
"""Llama 3.1 8B behind the contract of training/workload.py."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from input_pipeline import Pipeline, Share
from models.llama.architectures import ARCHITECTURES
from models.llama.layer import can_fuse
from settings.plan import Course, Plan
from training.workload import Optimizer, Workload
from workloads.llama31_8b import corpora, course, optimizers, sequences
from workloads.llama31_8b.corpora import Corpus
from workloads.llama31_8b.fields import LlamaConfig
from workloads.llama31_8b.task import LanguageModelling


class Llama:
    """Pre-training of a language model, judged by its loss on held-out text."""

    head: tuple[str, ...] = ('params', 'head')

    def data(self, config: LlamaConfig) -> Corpus:
        """See the contract."""
        return corpora.find_corpus(config)

    def check(self, config: LlamaConfig, dataset: Corpus) -> None:
        """See the contract; every rule is one of fields."""

    def course(self, config: LlamaConfig, num_train: int) -> Course:
        """See the contract."""
        return course.create(config)

    def warnings(
        self, base: Mapping[str, Any], overrides: Mapping[str, str], config: LlamaConfig
    ) -> list[str]:
        """See the contract."""
        return []

    def pipeline(
        self, config: LlamaConfig, dataset: Corpus, seed: int | None, share: Share
    ) -> Pipeline:
        """See the contract."""
        return sequences.pipeline(
            dataset,
            length=config.sequence_length,
            vocabulary=ARCHITECTURES[config.model].vocabulary,
            samples_to_train=config.max_steps * config.global_batch_size,
            seed=seed,
            share=share,
            processes=config.data_processes,
        )

    def task(self, config: LlamaConfig, dataset: Corpus) -> LanguageModelling:
        """See the contract."""
        return LanguageModelling(
            ARCHITECTURES[config.model],
            config.sequence_length,
            config.dtype,
            fused=can_fuse(jnp.dtype(config.dtype)),
        )

    def particulars(self, config: LlamaConfig) -> Mapping[str, str]:
        """Whose attention it is."""
        if not can_fuse(jnp.dtype(config.dtype)):
            return {'attention': "our own; cuDNN's needs half precision and a GPU, Ampere or later"}
        backward = ', with its deterministic backward' if config.deterministic else ''
        return {'attention': f"cuDNN's{backward}"}

    def optimizer(self, config: LlamaConfig, plan: Plan) -> Optimizer:
        """See the contract."""
        return optimizers.create(config)


WORKLOAD: Workload = Llama()
