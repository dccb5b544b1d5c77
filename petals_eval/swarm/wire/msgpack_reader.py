"""Strangers' msgpack, read within bounds: a few hundred bytes of it would otherwise end the process.

msgpack's decoder keeps 40 KB of state on the C stack, and hivemind starts another one inside it for each tuple within a
tuple: at about 200 of them the stack is full and the interpreter dies of it (msgpack 1.1, hivemind 1.1.12), which no
`except` sees. What a server says of itself and what lies in the DHT are both read like this.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import msgpack
from hivemind.utils.serializer import MSGPackSerializer

__all__ = ["DEEPEST", "Descriptor", "bound_hivemind", "loads"]

DEEPEST = 16
"""Messages within messages that are read; Petals' own have four."""

_TUPLE = MSGPackSerializer._TUPLE_EXT_TYPE_CODE
_DESCRIPTOR = 0x51


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A tensor's descriptor, as it was written: "torch.float32", and sizes of which the first one is open."""

    dtype: object
    size: object


def loads(serialized: bytes) -> object:
    """What hivemind's serializer wrote: tuples and descriptors of tensors, anything else of its own as bytes.

    Not by hivemind's decoder, which looks dtypes up among all of torch's attributes: some names import half of torch
    (5 s for "_inductor"). Raises ValueError, or TypeError for a map with keys that cannot be.
    """
    return _read(serialized, 0)


def _read(serialized: bytes, depth: int) -> object:
    if depth > DEEPEST:
        raise ValueError(f"more than {DEEPEST} messages within messages")

    def extension(code: int, content: bytes) -> object:
        if code not in (_TUPLE, _DESCRIPTOR):
            return content
        inner = _read(content, depth + 1)
        if code == _TUPLE:
            return tuple(inner) if isinstance(inner, list) else inner
        return Descriptor(inner.get("dtype"), inner.get("size")) if isinstance(inner, dict) else inner

    return msgpack.unpackb(serialized, ext_hook=extension, raw=False)


class _Depth(threading.local):
    now = 0


_depth = _Depth()


def bound_hivemind() -> None:
    """Have hivemind's own decoder, which reads what lies in the DHT, raise ValueError where messages are too deep.

    For the whole process, since hivemind's classes name their decoder; safe to call again.
    """
    original: Callable[..., object] = MSGPackSerializer._decode_ext_types.__func__
    if getattr(original, "is_bounded", False):
        return

    def decode(cls: type, type_code: int, data: bytes) -> object:
        if _depth.now >= DEEPEST:
            raise ValueError(f"more than {DEEPEST} messages within messages")
        _depth.now += 1
        try:
            return original(cls, type_code, data)
        finally:
            _depth.now -= 1

    decode.is_bounded = True  # type: ignore[attr-defined]
    MSGPackSerializer._decode_ext_types = classmethod(decode)
