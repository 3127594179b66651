# SPDX-License-Identifier: Apache-2.0
"""The README's commands, as a user runs them."""

import re
import subprocess

import pytest

from tests.end_to_end.program import ROOT, environment, share_programs

# The recipes' own targets: tests/end_to_end/test_run.py, and docs/convergence.
NEAR = {
    'configs/digits.py': '--config.target_top1=0.8',
    'configs/speeches.py': '--config.target_loss=2.2',
}


@pytest.mark.slow
def test_the_commands_work(tmp_path, own_environment):
    """To the letter, but for where they write and how far they train."""
    variables = environment(**own_environment)
    del variables['JAX_NUM_CPU_DEVICES']  # Users have as many as the program chooses.
    share_programs(tmp_path)
    ran = 0
    for block in re.findall(r'```sh\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL):
        for line in block.splitlines():
            command = line.split(' #')[0].strip()
            # This is the one, and tests/end_to_end/test_run.py has the other.
            if command in ('scripts/run_tests.sh', 'scripts/run_and_time.sh'):
                continue
            if 'run_and_time.sh' in command:
                (target,) = (NEAR[word] for word in command.split() if word in NEAR)
                command += f' --workdir={tmp_path / str(ran)} {target}'
            done = subprocess.run(
                command, shell=True, cwd=ROOT, env=variables, capture_output=True, text=True,
                check=False,
            )  # fmt: skip
            assert done.returncode == 0, f'{command}\n{done.stdout}\n{done.stderr}'
            ran += 1
    assert ran >= 4
