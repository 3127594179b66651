# SPDX-License-Identifier: Apache-2.0
"""ResNet behind the contract of training/workload.py."""

from collections.abc import Mapping
from typing import Any

from input_pipeline import Pipeline, Share
from settings.errors import ConfigError
from settings.plan import MOST_STEPS, Course, Evaluation, Plan, Ruleset, Target
from training.workload import Optimizer, Workload
from workloads.resnet import advice, images, optimizers
from workloads.resnet.fields import ResNetConfig, is_evaluated
from workloads.resnet.records import Dataset, find_dataset
from workloads.resnet.task import ImageClassification


class ResNet:
    """Image classification by ResNet v1.5, judged by top-1 accuracy."""

    head: tuple[str, ...] = ('params', 'fc')

    def data(self, config: ResNetConfig) -> Dataset:
        """See the contract."""
        return find_dataset(config.dataset, config.data_dir)

    def check(self, config: ResNetConfig, dataset: Dataset) -> None:
        """See the contract."""
        images.check(config, dataset)

    def course(self, config: ResNetConfig, num_train: int) -> Course:
        """See the contract.

        The evaluation of epoch e follows step ceil(e·N / B): the mixed batch that holds the epoch's
        last example (MLPerf training rules, section on the training loop).
        """
        batch, every = config.global_batch_size, config.eval_every_epochs
        if batch > num_train:
            raise ConfigError(
                f'global_batch_size={batch} is larger than the training set of {num_train}; '
                f'use at most {num_train}.'
            )
        last_step = -(-config.max_epochs * num_train // batch)
        if last_step > MOST_STEPS:
            raise ConfigError(
                f'max_epochs={config.max_epochs} at global_batch_size={batch} are {last_step:,} '
                f'steps, more than {MOST_STEPS:,}; use fewer epochs or a larger batch.'
            )
        evaluations: list[Evaluation] = []
        before = 0
        for epoch in range(1, config.max_epochs + 1):
            if not is_evaluated(epoch, every, config.eval_offset_epochs):
                continue
            block = {'first_epoch_num': before + 1, 'epoch_count': epoch - before}
            step = -(-epoch * num_train // batch)
            evaluations.append(Evaluation(step, epoch, block, block, {'epoch_num': epoch}))
            before = epoch
        return Course(
            evaluations=tuple(evaluations),
            target=Target('eval_top1', 'top-1', config.target_top1, largest=1.0),
            unit='epoch',
            examples_per_unit=num_train,
            examples='images',
            ruleset=Ruleset('4.0.0'),
        )

    def warnings(
        self, base: Mapping[str, Any], overrides: Mapping[str, str], config: ResNetConfig
    ) -> list[str]:
        """See the contract."""
        return advice.warnings(base, overrides, config)

    def pipeline(
        self, config: ResNetConfig, dataset: Dataset, seed: int | None, share: Share
    ) -> Pipeline:
        """See the contract."""
        return images.pipeline(dataset, config, seed, share)

    def task(self, config: ResNetConfig, dataset: Dataset) -> ImageClassification:
        """See the contract."""
        return ImageClassification(config, dataset.num_classes)

    def particulars(self, config: ResNetConfig) -> Mapping[str, str]:
        """See the contract; there are none."""
        return {}

    def optimizer(self, config: ResNetConfig, plan: Plan) -> Optimizer:
        """See the contract."""
        return optimizers.create(config, plan)


WORKLOAD: Workload = ResNet()
