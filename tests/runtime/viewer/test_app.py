"""What the viewer answers, by the real server: numbers, refusals, and attacks."""

from __future__ import annotations

import csv
import io
import re
import socket

import numpy as np
import pytest
from viewing import SPOTS, Client, brute_force

from stpath_runtime import InputError
from stpath_runtime.viewer import app
from stpath_runtime.viewer.server import listening, served
from stpath_runtime.viewer.shown import open_shown


def test_info_tells_what_is_shown(client, loaded):
    status, info = client.json("/api/info")
    assert status == 200
    assert (info["spots"], info["genes"], info["name"]) == (SPOTS, len(loaded.vocabulary), "prediction.h5ad")
    assert info["provenance"]["organ"] == "Kidney"
    assert info["context"] == [0, 1, 2, 3, 4]
    assert (info["decoded"], info["units"], info["tissue"]) == (True, "log1p raw counts", None)


def test_spots_and_genes_are_those_of_the_file(client, predicted, every_gene, loaded):
    np.testing.assert_array_equal(client.floats("/api/spots").reshape(-1, 2), predicted.obsm["spatial"])
    assert client.json("/api/spot/299") == (200, {"name": predicted.obs_names[299]})
    for name in ("GENE1", loaded.vocabulary.ensembl_ids[6], "ALIAS3"):
        column = loaded.vocabulary.find(name) - 2
        np.testing.assert_allclose(client.floats(f"/api/gene/{name}"), every_gene[:, column], atol=1e-5)


def test_genes_are_found_by_any_of_their_names(client, loaded):
    assert client.json("/api/genes?search=gene1&limit=3") == (200, ["GENE1", "GENE10", "GENE11"])
    assert client.json("/api/genes?search=ALIAS3&limit=1") == (200, ["ALIAS3"])
    ensembl = loaded.vocabulary.ensembl_ids[4]
    assert client.json(f"/api/genes?search={ensembl[3:]}") == (200, [ensembl])
    assert client.json("/api/genes?search=nothing-like-it") == (200, [])


@pytest.mark.parametrize("against", ["rest", [0, 5, 9, 9, 200]])
def test_a_region_is_that_of_brute_force(client, every_gene, loaded, against):
    inside = list(range(20, 90))
    status, found = client.json("/api/region", method="POST", body={"inside": inside, "against": against})
    others = np.setdiff1d(np.arange(SPOTS), inside) if against == "rest" else np.unique(against)
    means, _, difference, effect = brute_force(every_gene, inside, others)
    assert (status, found["spots"], found["against"]) == (200, 70, len(others))
    assert len(found["genes"]) == min(50, len(loaded.vocabulary))
    assert sorted((abs(row["effect"]) for row in found["genes"]), reverse=True) == [
        abs(row["effect"]) for row in found["genes"]
    ]
    for row in found["genes"]:
        column = loaded.vocabulary.find(row["name"]) - 2
        assert row["inside"] == pytest.approx(means[column], rel=1e-4, abs=1e-4)
        assert row["difference"] == pytest.approx(difference[column], rel=1e-4, abs=1e-5)
        assert row["effect"] == pytest.approx(effect[column], rel=1e-4, abs=1e-4)


def test_a_region_by_its_outline_and_chosen_genes(client, predicted):
    x, y = predicted.obsm["spatial"].T
    body = {"polygon": [[-1, -1], [1000, -1], [1000, 1000], [-1, 1000]], "genes": ["GENE2", "ALIAS3"]}
    status, found = client.json("/api/region", method="POST", body=body)
    assert (status, found["spots"]) == (200, int(((x < 1000) & (y < 1000)).sum()))
    assert [row["name"] for row in found["genes"]] == ["GENE2", "GENE3"]


def test_coexpression_is_pearsons(client, every_gene, loaded):
    status, found = client.json("/api/coexpression/GENE1?top=3")
    exact = np.corrcoef(every_gene.T.astype(np.float64))[loaded.vocabulary.find("GENE1") - 2]
    assert status == 200
    assert [row["r"] for row in found] == pytest.approx(sorted(exact)[-4:-1][::-1], abs=1e-4)
    assert "GENE1" not in [row["name"] for row in found]


def test_the_table_names_spots_genes_and_regions(client, predicted, every_gene, loaded):
    square = [[-1, -1], [500, -1], [500, 500], [-1, 500]]
    assert client.json("/api/regions", method="PUT", body={"=tumour": square})[0] == 200
    status, headers, body = client.ask("/api/export.csv?genes=GENE2,GENE1")
    rows = list(csv.reader(io.StringIO(body.decode())))
    assert (status, headers["content-type"].split(";")[0]) == (200, "text/csv")
    assert rows[0] == ["spot", "x", "y", "GENE2", "GENE1", "region"]
    assert [row[0] for row in rows[1:]] == list(predicted.obs_names)
    numbers = np.array([row[1:5] for row in rows[1:]], float)
    columns = [loaded.vocabulary.find(name) - 2 for name in ("GENE2", "GENE1")]
    np.testing.assert_allclose(numbers[:, 2:], every_gene[:, columns], atol=1e-4)
    inside = (predicted.obsm["spatial"] < 500).all(axis=1)
    assert [row[5] for row in rows[1:]] == ["'=tumour" if is_in else "" for is_in in inside]  # no formula


@pytest.mark.parametrize(
    ("path", "method", "body", "status", "told"),
    [
        ("/api/gene/GENE", "GET", None, 404, "no gene 'GENE' (did you mean "),
        ("/api/coexpression/nothing", "GET", None, 404, "no gene 'nothing'"),
        ("/api/genes?search=G&limit=0", "GET", None, 400, "limit=0: give a whole number from 1 to 1,000"),
        ("/api/genes?search=G&limit=1e9", "GET", None, 400, "limit=1e9"),
        ("/api/genes?search=G&limit=%C2%B2", "GET", None, 400, "give a whole number"),
        ("/api/coexpression/GENE1?top=-4", "GET", None, 400, "top=-4"),
        ("/api/region", "POST", {"polygon": [[0, 0], [1, 1]]}, 400, "2 corners; give 3"),
        ("/api/region", "POST", {"polygon": [[9e9, 0], [9e9, 1], [9e10, 2]]}, 400, "no spot is inside"),
        ("/api/region", "POST", {"inside": [0, 300]}, 400, "names spot 300; there are 300, from 0 to 299"),
        ("/api/region", "POST", {"inside": [-1]}, 400, "names spot -1"),
        ("/api/region", "POST", {"inside": [True]}, 400, "a list of positions"),
        ("/api/region", "POST", {"inside": [0.5]}, 400, "a list of positions"),
        ("/api/region", "POST", {"inside": "all"}, 400, "a list of positions"),
        ("/api/region", "POST", {"inside": list(range(300))}, 400, "no spot is left"),
        ("/api/region", "POST", {"inside": [1], "against": []}, 400, "no spot is left"),
        ("/api/region", "POST", {"inside": [1], "against": "others"}, 400, "or rest"),
        ("/api/region", "POST", {"inside": [1], "genes": ["NOPE"]}, 404, "no gene 'NOPE'"),
        ("/api/region", "POST", {"inside": [1], "genes": "GENE1"}, 400, "genes is a list of names"),
        ("/api/region", "POST", {"inside": [1], "genes": ["GENE1"] * 1001}, 400, "1,001 genes are named"),
        ("/api/region", "POST", {"inside": [1], "polygon": []}, 400, "either polygon"),
        ("/api/region", "POST", {"inside": [1], "agianst": [2]}, 400, "'agianst' is none of"),
        ("/api/region", "POST", [1], 400, "not a JSON object"),
        ("/api/region", "POST", b"{", 400, "not JSON"),
        ("/api/region", "POST", b"[" * 100_000, 400, "not JSON"),
        ("/api/regions", "PUT", {"a": [[0, 0]]}, 400, "1 corners"),
        ("/api/spot/300", "GET", None, 400, "spot 300: there are 300, from 0 to 299"),
        ("/api/export.csv?genes=GENE1,NOPE", "GET", None, 404, "no gene 'NOPE'"),
        ("/tile/0/0/0", "GET", None, 400, "there is no picture of the tissue; give --image"),
    ],
)
def test_a_wrong_request_says_what_is_wrong(client, path, method, body, status, told):
    found, answer = client.json(path, method=method, body=body)
    assert (found, told in answer["error"]) == (status, True), answer


def test_a_body_that_is_too_large_is_not_read(client, monkeypatch):
    monkeypatch.setattr(app, "MOST_BYTES", 1000)
    status, answer = client.json("/api/region", method="POST", body={"inside": [1] * 5000})
    assert (status, "larger than" in answer["error"]) == (400, True)


PATHS = ("/", "/api/info", "/api/spots", "/api/gene/GENE1", "/api/export.csv?genes=GENE1", "/zarr/.zmetadata")


@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_told_without_the_token(client, path):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {client.token}"}):
        status, _, body = client.ask(path, headers=headers)
        assert (status, b"GENE" in body) == (401, False)
    joined = "&" if "?" in path else "?"
    assert client.ask(f"{path}{joined}token={client.token}", headers={})[0] == 200
    assert client.ask(f"{path}{joined}token=%F0%9F%A6%8A", headers={})[0] == 401


@pytest.mark.parametrize("path", PATHS)
def test_another_name_for_this_machine_is_refused(client, path):
    """DNS rebinding: a page of evil.example asks 127.0.0.1 under its own name."""
    port = client.base.rpartition(":")[2]
    own = {"Authorization": f"Bearer {client.token}"}
    for host in (f"evil.example:{port}", "evil.example", f"127.0.0.1.evil.example:{port}", "192.0.2.1", ""):
        assert client.ask(path, headers={**own, "Host": host})[0] == 421
    assert client.ask(path, headers={**own, "Host": f"localhost:{port}"})[0] == 200


def test_beyond_this_machine_its_name_and_addresses_are_taken_and_no_other_name(shown):
    with served(shown, "0.0.0.0") as address:
        client = Client(address.replace("0.0.0.0", "127.0.0.1"))
        own = {"Authorization": f"Bearer {client.token}"}
        for host, status in ((socket.gethostname(), 200), ("192.0.2.1:80", 200), ("evil.example", 421)):
            assert client.ask("/api/info", headers={**own, "Host": host})[0] == status


def test_a_page_of_another_site_is_refused_but_for_zarr(client):
    own = {"Authorization": f"Bearer {client.token}", "Origin": "https://evil.example"}
    status, headers, _ = client.ask("/api/info", headers=own)
    assert (status, "access-control-allow-origin" in headers) == (403, False)
    status, headers, _ = client.ask("/zarr/.zmetadata", headers=own)
    assert (status, headers["access-control-allow-origin"]) == (200, "*")
    assert client.ask("/zarr/.zmetadata", method="OPTIONS", headers={"Origin": "https://evil.example"})[0] == 204
    assert client.ask("/api/info", headers={**own, "Origin": client.base})[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/page/../app.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py", "/page//etc/passwd", "/page/%2fetc%2fpasswd",
        "/zarr/../../../etc/passwd", "/zarr/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/zarr//etc/passwd", "/zarr/X/0.99",
        "/zarr/X/00.0", "/zarr/X/-1.0", "/tile/0/0/%2e%2e", "/api/gene/..%2f..%2fetc%2fpasswd",
    ],
)  # fmt: skip
def test_no_request_reads_a_path(client, path):
    with socket.create_connection(("127.0.0.1", int(client.base.rpartition(":")[2]))) as raw:  # sent as it is
        own = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {client.token}\r\nConnection: close\r\n"
        raw.sendall(f"{own}\r\n".encode())
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    assert answer.split()[1] in (b"404", b"400"), answer[:200]
    assert b"root:" not in answer


def test_the_page_may_run_its_own_scripts_alone(client):
    _, headers, body = client.ask("/")
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert b"<script>" not in body
    assert not re.search(rb"<[^>]*\s(on\w+|style)\s*=", body)  # what the policy would not run


def test_a_file_that_changes_is_not_shown_any_longer(client, prediction):
    assert client.json("/api/info")[0] == 200
    prediction.rename(prediction.with_suffix(".old"))
    for path in ("/api/info", "/api/gene/GENE1", "/api/coexpression/GENE1", "/api/export.csv?genes=GENE1"):
        status, answer = client.json(path)
        assert (status, "changed or gone since it was opened" in answer["error"]) == (409, True)


def test_without_the_engine_the_genes_of_the_file_are_shown(prediction, predicted):
    with open_shown(prediction) as shown, served(shown) as address:
        client = Client(address)
        assert client.json("/api/info")[1]["genes"] == 3
        np.testing.assert_array_equal(client.floats("/api/gene/GENE3"), predicted[:, "GENE3"].X[:, 0])
        status, answer = client.json("/api/gene/GENE9")
        assert (status, "no gene 'GENE9'" in answer["error"]) == (404, True)
        inside = list(range(50))
        _, found = client.json("/api/region", method="POST", body={"inside": inside})
        exact = brute_force(predicted.X, inside, np.arange(50, SPOTS))[3]
        assert {row["name"]: row["effect"] for row in found["genes"]} == pytest.approx(
            dict(zip(predicted.var_names, exact, strict=True)), rel=1e-4
        )


def test_a_port_that_is_taken_is_told():
    with listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port}: .*in use.*leave it out"), listening("127.0.0.1", port):
            pass


def test_a_host_that_is_none_of_this_machine_is_told():
    with pytest.raises(InputError, match="--host 192.0.2.1"), listening("192.0.2.1", 0):
        pass
