"""A live Petals model inside somebody's training loop: the public names of `petals_eval.live_model`."""

from petals_eval.live_model import LIVE_PROMPTS, LivePart, close, connect, is_petals_model, opened

__all__ = ["LIVE_PROMPTS", "LivePart", "close", "connect", "is_petals_model", "opened"]
