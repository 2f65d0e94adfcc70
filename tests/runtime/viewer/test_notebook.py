"""The viewer in a notebook."""

from __future__ import annotations

import html
import re

import pytest
from viewing import SPOTS, Client

import stpath_runtime
from stpath_runtime import InputError


@pytest.mark.parametrize("given", ["file", "anndata", "folder of the engine"])
def test_a_prediction_is_shown_in_a_frame_until_it_is_closed(prediction, predicted, loaded, given):
    shown = stpath_runtime.view(
        predicted if given == "anndata" else prediction, loaded.path if given.startswith("folder") else loaded
    )
    (address,) = re.findall(r'<iframe src="([^"]+)"', shown._repr_html_())
    client = Client(html.unescape(address))
    assert client.address == shown.address
    assert client.json("/api/info")[1]["spots"] == SPOTS
    assert client.floats("/api/gene/GENE9").shape == (SPOTS,)
    assert "frame-ancestors http://localhost:*" in client.ask("/")[1]["content-security-policy"]
    shown.close()
    with pytest.raises(OSError, match="refused"):
        client.ask("/api/info")


def test_what_is_no_prediction_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        stpath_runtime.view(tmp_path / "none.h5ad")
    with pytest.raises(AttributeError, match="no attribute 'veiw'"):
        stpath_runtime.veiw  # noqa: B018
