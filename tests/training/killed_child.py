"""What the tests run in a process that they kill; its programs are made when it is imported, once for all such processes."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from ntc.training.state import News
from tests.programs import canonical, spiking
from tests.training.training_cases import trainer

torch.set_num_threads(1)
canonical(), spiking()


def train(folder: Path) -> None:
    """A run whose steps take long enough to be killed in."""

    def slowly(news: News) -> None:
        time.sleep(0.01)

    trainer(folder, news=slowly).run()
