"""The model families, by the name of their architecture; and the one lookup, from a base to its family."""

from __future__ import annotations

from runner.base.architectures import FLUX1, architecture_of
from runner.base.files import transformer_config
from runner.model.base import Base
from runner.model.family import ModelFamily
from runner.model.flux1.family import Flux1Family

FAMILIES: dict[str, ModelFamily] = {FLUX1.name: Flux1Family()}


def family_of(base: Base) -> ModelFamily:
    """By the class that the transformer's config names. Raises FluxrunError for one that no family has."""
    config = transformer_config("", base.folder)
    return FAMILIES[architecture_of(config).name]
