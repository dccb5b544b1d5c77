import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from petals_eval.local_swarm import LocalSwarm
from tests.integrations.harness import write_tasks
from tests.support.real_swarm import STORIES

CHAT = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="session")
def stories_that_chat(realdata: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model with a chat template beside its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / STORIES
    shutil.copytree(realdata / STORIES, folder)
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


@pytest.fixture(scope="session")
def swarm(stories_that_chat: Path) -> Iterator[LocalSwarm]:
    with LocalSwarm(stories_that_chat, spans=[(0, 3), (3, 5), (0, 5)], mode="thread") as running:
        yield running


@pytest.fixture(scope="session")
def where(stories_that_chat: Path, swarm: LocalSwarm) -> dict[str, Any]:
    """How a backend is told of the model and its swarm."""
    return {
        "pretrained": str(stories_that_chat),
        "initial_peers": swarm.initial_peers,
        "dht_prefix": swarm.dht_prefix,
        "request_timeout": 30,
        "deadline": 60,
    }


@pytest.fixture(scope="session")
def task_files(request: pytest.FixtureRequest, realdata: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of task files. In CI they have few documents, for these take the longest."""
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder, realdata, documents=None if request.config.getoption("--soak") else 2)
    return folder
