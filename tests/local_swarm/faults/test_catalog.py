"""The descriptions of faults."""

import pytest
from pydantic import ValidationError

from petals_eval.local_swarm.faults import catalog as f


def test_a_fault_that_makes_no_sense_is_refused():
    for kind, fields in [(f.Noise, {"share": 0}), (f.Hang, {"where": "after"}), (f.Slow, {"dealy": 3})]:
        with pytest.raises(ValidationError):
            kind(**fields)
