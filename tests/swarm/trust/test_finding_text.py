"""What a person is told of servers that cannot be counted on."""

from petals_eval.swarm.peers.finding import TrustFinding
from petals_eval.swarm.trust.finding_text import stop_text, warning_text
from petals_eval.swarm.wire.span import Span
from tests.support.fake_swarm import server


def finding(status, name="liar", **fields):
    return TrustFinding(server(name, 0, 4, version="2.2.0"), status, Span(1, 3), 0.25, **fields)


def test_a_warning_says_who_it_is_why_and_what_follows():
    assert warning_text(finding("wrong"), 2, {}) == (
        "warning: server ...liar (blocks 0:4, petals 2.2.0) answered otherwise than others that hold the same blocks "
        "(difference 0.25): its answers are wrong. It is left out and what it computed is computed again; 2 other "
        "servers hold these blocks."
    )
    assert "than the same blocks at home (" in warning_text(finding("wrong", witness="home"), 0, {})
    assert "otherwise again when it was asked once more" in warning_text(finding("wrong", witness="itself"), 0, {})
    text = warning_text(finding("nondeterministic", is_used=True), 0, {"hidden_dropout": 0.1})
    assert text.endswith(
        "gave two answers to one question (difference 0.25): its blocks run in training mode (this model's config has "
        "hidden_dropout 0.1). Nobody else holds these blocks, so it is used all the same."
    )


def test_a_dispute_names_everybody_once_and_how_to_settle_it():
    assert warning_text(finding("disputed", others=("one", "two")), 0, {}) == (
        "warning: servers ...liar and ...one and ...two do not agree on blocks 1:3 (difference 0.25), and nobody else "
        "can say who is right. Examples they computed are marked in the predictions. One more server of these blocks "
        "would settle it, or these blocks at home: --verify-local 1:3."
    )


def test_why_a_run_stops_names_three_servers_and_counts_the_rest():
    training = [finding("nondeterministic", f"d{index}") for index in range(5)]
    text = stop_text("1:3", training, {})
    assert text.startswith("no server in evaluation mode holds blocks 1:3:\n")
    assert [name for name in ("d0", "d1", "d2", "d3", "d4") if f"...{name} " in text] == ["d0", "d1", "d2"]
    assert "  and 2 more\n" in text and "--allow-nondeterministic" in text
    both = stop_text("1:3", [finding("wrong"), finding("nondeterministic", "d")], {})
    assert both.startswith("no server that is trusted holds blocks 1:3:\n")
    assert "Have dropout set to 0" in both and "as if they were the model's" in both
