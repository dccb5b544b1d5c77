"""The part of the compose specification that docker/compose.yaml uses, as a schema: anything else is refused.

Written from https://github.com/compose-spec/compose-spec (spec.md), not copied from its JSON schema.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Duration = Annotated[str, Field(pattern=r"^(\d+h)?(\d+m)?(\d+s)?$", min_length=2)]
Words = list[str]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Build(Strict):
    context: str
    dockerfile: str


class Healthcheck(Strict):
    test: Annotated[Words, Field(min_length=2)]
    interval: Duration
    timeout: Duration
    start_period: Duration | None = None


class Dependency(Strict):
    condition: Literal["service_started", "service_healthy", "service_completed_successfully"]


class Service(Strict):
    image: str
    build: Build | None = None
    entrypoint: Words = []
    command: Words
    volumes: list[Annotated[str, Field(pattern=r"^[\w./-]+:/[\w./-]+(:ro)?$")]]
    ports: list[Annotated[str, Field(pattern=r"^127\.0\.0\.1:\d+:\d+$")]] = []  # on this machine alone
    tmpfs: Words = []
    read_only: Literal[True]
    cap_drop: Annotated[list[Literal["ALL"]], Field(min_length=1)]
    security_opt: Annotated[list[Literal["no-new-privileges:true"]], Field(min_length=1)]
    depends_on: dict[str, Dependency] = {}
    restart: Literal["no", "unless-stopped"]
    healthcheck: Healthcheck | None = None


class Compose(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)  # x-...: fragments; checked to be nothing else

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    services: dict[Annotated[str, Field(pattern=r"^[a-z0-9-]+$")], Service]
    volumes: dict[str, None]
