"""The metadata of sessions."""

from hivemind.utils.serializer import MSGPackSerializer

from petals_eval.swarm.wire.session_messages import session_metadata, step_metadata


def test_a_server_is_never_to_wait_for_room():
    assert session_metadata(100, None)["alloc_timeout"] == 0.0
    metadata = MSGPackSerializer.loads(step_metadata("s", "1", session_metadata(100, "lora")))
    assert (metadata["alloc_timeout"], metadata["max_length"], metadata["active_adapter"]) == (0.0, 100, "lora")
