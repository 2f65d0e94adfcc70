"""Names of genes, organs and technologies."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stpath_runtime.errors import InputError
from stpath_runtime.slides.vocabulary import ORGANS, TECHNOLOGIES, GeneVocabulary, organ_token, technology_token

named_organs = [organ for organ in ORGANS if not organ.startswith("<")]
named_technologies = [t for t in TECHNOLOGIES if not t.startswith("<")]


def respelt(name: str) -> st.SearchStrategy[str]:
    """The name in another case and with other separators."""
    separators = st.sampled_from(["", " ", "-", "_", "."])
    cases = st.sampled_from([str.lower, str.upper, str.title, str])
    return st.builds(lambda case, sep: sep.join(case(word) for word in name.split()), cases, separators)


def test_published_genes():
    genes = GeneVocabulary.published()
    assert (len(genes), genes.n_tokens) == (38_982, 38_984)
    assert genes.ensembl_ids[0] == "ENSG00000000003"
    assert list(genes.ensembl_ids) == sorted(genes.ensembl_ids)
    assert genes.tokens(["TSPAN6", "TM4SF6", "ENSG00000000003", "ENSG00000000003.15"]).tolist() == [2, 2, 2, 2]
    assert genes.names([2]) == ["TSPAN6"]
    assert genes.tokens(["GATA3", "ERBB2"]).tolist() == [genes.find("ENSG00000107485"), genes.find("ENSG00000141736")]
    assert genes.gene_ids([genes.find("H3F3A")]) == ["ENSMUSG00000060743"]  # kept as STPath has it


def test_every_gene_is_found_by_its_shown_name_and_its_id():
    genes = GeneVocabulary.published()
    tokens = genes.all_tokens()
    assert (genes.tokens(genes.names(tokens)) == tokens).all()
    assert (genes.tokens(genes.gene_ids(tokens)) == tokens).all()


def test_unknown_genes_are_named_with_the_nearest():
    with pytest.raises(InputError, match=r"'GATA33' \(did you mean .*GATA3.*2 of 3 genes|2 of 3 genes.*GATA3"):
        GeneVocabulary.published().tokens(["GATA33", "ERBB2", "qqqqqqqqqqq"])
    with pytest.raises(InputError, match="EPCAM"):
        GeneVocabulary.published().tokens(["epcam"])


def test_a_byte_order_mark_is_no_part_of_a_symbol_table(tmp_path):
    (tmp_path / "genes.JSON").write_text('{"A": "ENSG1"}', encoding="utf-8-sig")
    assert GeneVocabulary.read(tmp_path / "genes.JSON").tokens(["A"]).tolist() == [2]


def test_symbol_table_ranks_its_sorted_ids(tmp_path):
    table = {"B": "ENSG2", "A": "ENSG3", "C": "ENSG1", "B-alias": "ENSG2"}
    path = tmp_path / "symbol2ensembl.json"
    path.write_text(json.dumps(table))
    genes = GeneVocabulary.read(path)
    assert genes.ensembl_ids == ("ENSG1", "ENSG2", "ENSG3")
    assert genes.tokens(["C", "B", "B-alias", "A"]).tolist() == [2, 3, 3, 4]
    assert genes.names([2, 3, 4]) == ["C", "B", "A"]

    genes.write(tmp_path / "genes.tsv.gz")
    again = GeneVocabulary.read(tmp_path / "genes.tsv.gz")
    assert (again.ensembl_ids, again.symbols, again.aliases) == (genes.ensembl_ids, genes.symbols, genes.aliases)


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        "{}",
        '{"A": null}',
        "not json",
        '{"A": 3}',
        '{"ENSG1": "A"}',
        '{"A": "ENSG1", "A": "ENSG2"}',
        '{"": "ENSG1"}',
    ],
)
def test_a_file_that_is_no_symbol_table_is_refused(text, tmp_path):
    path = tmp_path / "genes.json"
    path.write_text(text)
    with pytest.raises(InputError, match="genes.json"):
        GeneVocabulary.read(path)
    with pytest.raises(InputError, match="no such"):
        GeneVocabulary.read(tmp_path / "missing.json")


@pytest.mark.parametrize("rows", ["", "2\tENSG1\thuman\tA", "3\tENSG1\thuman\tA\t", "x\tENSG1\thuman\tA\t"])
def test_a_table_of_no_genes_or_of_wrong_lines_is_refused(rows, tmp_path):
    path = tmp_path / "genes.tsv"
    path.write_text("token_id\tensembl_id\tspecies\tsymbol\tother_symbols\n" + rows)
    with pytest.raises(InputError, match=r"genes.tsv: not a gene vocabulary"):
        GeneVocabulary.read(path)


@given(st.sampled_from(named_organs).flatmap(lambda name: st.tuples(st.just(name), respelt(name))))
def test_organs_resolve_whatever_case_and_punctuation(pair):
    name, spelt = pair
    assert organ_token(spelt) == ORGANS.index(name)


@given(st.sampled_from(named_technologies).flatmap(lambda name: st.tuples(st.just(name), respelt(name))))
def test_technologies_resolve_whatever_case_and_punctuation(pair):
    name, spelt = pair
    assert technology_token(spelt) == TECHNOLOGIES.index(name)


def test_spellings_of_the_published_alignment():
    others = [
        "Bladder",
        "Lymphoid",
        "Cervix",
        "Lymph node",
        "lymphnode",
        "Embryo",
        "Lung/Brain",
        "Kidney/Brain",
        "joint",
    ]
    others += ["Placenta", "Whole organism", "thymus", "undifferentiated pleomorphic sarcoma", "largeintestine"]
    others += ["lacrimal gland", "leiomyosarcoma", "endometrium", "brain+kidney", "cerebellum", "cervix", "colorectal"]
    assert {organ_token(name) for name in others} == {24}
    assert {organ_token(name) for name in (None, "others", "Other")} == {24}
    assert (organ_token("ovary"), organ_token("Ovary")) == (19, 19)
    assert [technology_token(name) for name in (None, "ST", "VisiumHD", "Visium-HD", "xenium")] == [0, 1, 4, 4, 3]


@pytest.mark.parametrize("name", ["Kidny", "", "<pad>", "pad", 3])
def test_an_unknown_organ_is_an_error_and_never_a_pad(name):
    with pytest.raises(InputError, match="organ"):
        organ_token(name)
    with pytest.raises(InputError, match="technology"):
        technology_token(name)


def test_the_nearest_organ_is_named():
    with pytest.raises(InputError, match=r"'Kidny' \(did you mean Kidney"):
        organ_token("Kidny")


@pytest.mark.parametrize(
    ("newer", "older"),
    [
        *(("TAFAZZIN", "TAZ"), ("NHERF2", "SLC9A3R2"), ("NHERF4", "PDZD3"), ("BLTP1", "KIAA1109"), ("SKIC2", "SKIV2L")),
        *(("SKIC3", "TTC37"), ("STEEP1", "CXorf56"), ("EEIG1", "FAM102A"), ("KICS2", "C12orf66")),
    ],
)
def test_newer_symbols_of_hgnc(newer, older):
    genes = GeneVocabulary.published()
    assert genes.find(newer) == genes.find(older) is not None
