"""Names to tokens: genes, organs and technologies, as STPath numbers them."""

from __future__ import annotations

import difflib
import gzip
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import GeneError, InputError, SlideError, VocabularyError, warn

PAD_TOKEN, MASK_TOKEN, FIRST_GENE_TOKEN = 0, 1, 2
PUBLISHED_GENES = "stpath_genes.tsv.xz"
COLUMNS = ("token_id", "ensembl_id", "species", "symbol", "other_symbols")
ENSEMBL_ID = re.compile(r"^ENS[A-Z]*G\d+$")
ENSEMBL_VERSION = re.compile(r"^(ENS[A-Z]*G\d+)\.\d+$")

ORGANS = (
    *("<pad>", "<mask>", "<unk>", "Spinal cord", "Brain", "Breast", "Bowel", "Skin", "Heart", "Kidney", "Prostate"),
    *("Lung", "Liver", "Uterus", "Bone", "Muscle", "Eye", "Pancreas", "Mouth", "Ovary", "Glioma", "Glioblastoma"),
    *("Stomach", "Colon", "Others"),
)
TECHNOLOGIES = ("<pad>", "Spatial Transcriptomics", "Visium", "Xenium", "Visium HD")
DEFAULT_ORGAN, DEFAULT_TECHNOLOGY = "Others", "<pad>"

# The spellings of HEST-1k and STImage-1K4M that the published alignment sends to Others.
_ORGANS_WITHOUT_TOKEN = (
    *("Other", "Bladder", "Lymphoid", "Cervix", "Lymph node", "Embryo", "Lung/Brain", "Kidney/Brain", "Placenta"),
    *("Whole organism", "thymus", "joint", "undifferentiated pleomorphic sarcoma", "largeintestine", "lacrimal gland"),
    *("leiomyosarcoma", "endometrium", "brain+kidney", "cerebellum", "colorectal"),
)
_TECHNOLOGY_ALIASES = {"ST": "Spatial Transcriptomics", "10x Visium": "Visium", "10x Xenium": "Xenium"}


@dataclass(frozen=True, eq=False)
class GenePanel:
    """Genes of a prediction, each once, in the order of its columns."""

    names: list[str]  #: [G], as asked for; symbols where all are
    tokens: npt.NDArray[np.int64]  #: [G]
    gene_ids: list[str]  #: [G], Ensembl ids

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class _Joined(Sequence[Sequence[str]]):
    """Names as the TSV has them, "A|B", split where they are read."""

    texts: Sequence[str]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, i: Any) -> Any:
        return self.texts[i].split("|") if self.texts[i] else ()


class GeneVocabulary:
    """The genes of a model, in token order.

    Parameters
    ----------
    ensembl_ids
        Ensembl id of each gene; the first has token 2 (token 0 is pad, 1 is mask).
    symbols
        The symbol to show for each gene; empty where there is none.
    aliases
        Further names of each gene.
    species
        Species of each gene; empty where unknown.

    Raises
    ------
    InputError
        If two genes share an Ensembl id.
    """

    def __init__(
        self,
        ensembl_ids: Sequence[str],
        symbols: Sequence[str],
        aliases: Sequence[Sequence[str]],
        species: Sequence[str] | None = None,
    ) -> None:
        self.ensembl_ids = tuple(ensembl_ids)
        self.symbols = tuple(symbols)
        self._aliases = aliases
        self.species = tuple(species) if species is not None else ("",) * len(self.ensembl_ids)
        if len(set(self.ensembl_ids)) != len(self.ensembl_ids):
            raise VocabularyError("gene vocabulary: an Ensembl id appears twice; each gene needs one line")

    def __len__(self) -> int:
        return len(self.ensembl_ids)

    def __repr__(self) -> str:
        return f"GeneVocabulary({len(self):,} genes)"

    @cached_property
    def aliases(self) -> tuple[tuple[str, ...], ...]:
        """Further names of each gene; made when they are first asked for, as most slides are predicted without."""
        return tuple(tuple(names) for names in self._aliases)

    @cached_property
    def _token(self) -> dict[str, int]:
        """Of every name. A symbol wins over an alias, and an id over both: later entries overwrite earlier ones."""
        found: dict[str, int] = {}
        for names in (self.aliases, [(symbol,) for symbol in self.symbols], [(gene,) for gene in self.ensembl_ids]):
            found.update({n: token for token, group in enumerate(names, FIRST_GENE_TOKEN) for n in group if n})
        return found

    @property
    def n_tokens(self) -> int:
        """Columns of the model: the genes, and the pad and mask tokens."""
        return len(self) + FIRST_GENE_TOKEN

    @classmethod
    def published(cls) -> GeneVocabulary:
        """STPath's 38,982 genes, as shipped with the package."""
        return _published()

    @classmethod
    def of_names(cls, names: Sequence[str], source: str) -> GeneVocabulary:
        """Genes by the names that a model has for them, with the Ensembl ids of those that STPath knows.

        Parameters
        ----------
        source
            What messages call the list.

        Raises
        ------
        InputError
            If a name appears twice.

        Examples
        --------
        >>> GeneVocabulary.of_names(["EPCAM", "MINE"], "genes.json").ensembl_ids
        ('ENSG00000119888', 'MINE')
        """
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise VocabularyError(f"{source}: the gene {twice[0]!r} appears twice; each needs a name of its own")
        known, ids = cls.published(), dict[str, None]()
        for name in names:
            token = known.find(name)
            gene = known.ensembl_ids[token - FIRST_GENE_TOKEN] if token is not None else name
            ids[gene if gene not in ids else name] = None  # two names of one gene are two outputs
        return cls(list(ids), names, [()] * len(names))

    @classmethod
    def read(cls, path: str | Path) -> GeneVocabulary:
        """Read a vocabulary: a `symbol2ensembl.json` (symbol to Ensembl id), or a TSV as `write` leaves it.

        In the JSON a gene's token is its rank among the sorted distinct ids, plus 2, as in the published code.

        Raises
        ------
        InputError
            If the file is missing or is neither of the two.
        """
        path = Path(path)
        if not path.is_file():
            raise VocabularyError(f"{path}: no such gene vocabulary file")
        try:
            if path.suffix.lower() == ".json":
                return cls._from_symbol_table(_read_json_object(path), path)
            raw = path.read_bytes()
            return cls._from_tsv((gzip.decompress(raw) if path.suffix == ".gz" else raw).decode())
        except (ValueError, KeyError, OSError, EOFError, RecursionError, zlib.error) as error:
            if isinstance(error, InputError):
                raise
            raise VocabularyError(
                f"{path}: not a gene vocabulary ({error}); give STPath's symbol2ensembl.json (symbol -> Ensembl id)"
            ) from error

    @classmethod
    def _from_symbol_table(cls, table: object, path: Path) -> GeneVocabulary:
        if not isinstance(table, dict) or not table:
            raise VocabularyError(f"{path}: not a gene vocabulary; expected a JSON object of symbol -> Ensembl id")
        for symbol, gene in table.items():
            if not isinstance(gene, str) or not ENSEMBL_ID.match(gene):
                raise VocabularyError(
                    f"{path}: symbol {symbol!r} has the id {gene!r}; every value must be an Ensembl id"
                )
            if not symbol.strip() or not symbol.isprintable():
                raise VocabularyError(f"{path}: the symbol {symbol!r} of {gene} is not a name; rename it")
        names: dict[str, list[str]] = {gene: [] for gene in sorted(set(table.values()))}
        for symbol, gene in table.items():
            names[gene].append(symbol)
        published = cls.published()
        symbols = []
        for gene, known in names.items():
            token = published._token.get(gene)
            usual = published.symbols[token - FIRST_GENE_TOKEN] if token is not None else ""
            symbols.append(usual if usual in known else known[0])
        aliases = [[n for n in known if n != shown] for known, shown in zip(names.values(), symbols, strict=True)]
        return cls(list(names), symbols, aliases)

    @classmethod
    def _from_tsv(cls, text: str) -> GeneVocabulary:
        # All cells at once: a list for each line would keep the garbage collector busy for most of an engine's load.
        cells = text.replace("\r\n", "\n").removesuffix("\n").replace("\n", "\t").split("\t")
        if tuple(cells[: len(COLUMNS)]) != COLUMNS:
            raise ValueError(f"the first line must name the columns {', '.join(COLUMNS)}")
        tokens, ids, species, symbols, others = (cells[i + len(COLUMNS) :: len(COLUMNS)] for i in range(len(COLUMNS)))
        counted = range(FIRST_GENE_TOKEN, len(tokens) + FIRST_GENE_TOKEN)
        if not tokens or len(cells) % len(COLUMNS) or list(map(int, tokens)) != list(counted):
            raise ValueError("token ids must count up from 2, one gene a line, at least one")
        return cls(ids, symbols, _Joined(others), species)

    def write(self, path: str | Path) -> None:
        """Write the vocabulary as a gzipped TSV, the same bytes for the same genes."""
        text = io.StringIO()
        text.write("\t".join(COLUMNS) + "\n")
        for token, row in enumerate(
            zip(self.ensembl_ids, self.species, self.symbols, self.aliases, strict=True), FIRST_GENE_TOKEN
        ):
            ensembl_id, species, symbol, aliases = row
            if any(c in name for name in (ensembl_id, symbol, *aliases) for c in "\t\n\r|"):
                raise VocabularyError(
                    f"gene vocabulary: a name of {ensembl_id} holds a tab, a line break or '|'; rename it"
                )
            text.write(f"{token}\t{ensembl_id}\t{species}\t{symbol}\t{'|'.join(aliases)}\n")
        Path(path).write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))

    def find(self, name: str) -> int | None:
        """Token of a gene by symbol, alias or Ensembl id (with or without version), or None."""
        token = self._token.get(name)
        if token is None and (match := ENSEMBL_VERSION.match(name)):
            token = self._token.get(match[1])
        return token

    def tokens(self, names: Iterable[str]) -> npt.NDArray[np.int64]:
        """Tokens of genes by symbol, alias or Ensembl id.

        Returns
        -------
        NDArray[int64]
            [G], in the order of the names.

        Raises
        ------
        InputError
            If a name is unknown; the message gives the nearest ones.
        """
        if isinstance(names, str):
            raise GeneError(f"genes must be a list of names, not the text {names!r}; give [{names!r}]")
        names = [str(name) for name in names]
        found = [self.find(name) for name in names]
        unknown = [name for name, token in zip(names, found, strict=True) if token is None]
        if unknown:
            shown = "; ".join(f"{name!r}{nearest_names(name, self._candidates(name))}" for name in unknown[:5])
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            noun = "gene" if len(unknown) == 1 else f"{len(unknown)} of {len(names)} genes"
            raise GeneError(
                f"unknown {noun}: {shown}{more}; give symbols, aliases or Ensembl ids of the engine's genes"
            )
        return np.array(found, dtype=np.int64)

    def panel(self, genes: Sequence[str] | None) -> GenePanel:
        """The genes that are asked for, each once, in the order asked; None means all.

        A gene that is asked for twice, by whichever of its names, is given once, by the first, with a warning.

        Raises
        ------
        InputError
            If a gene is unknown, or none is asked for.

        Examples
        --------
        >>> panel = GeneVocabulary.published().panel(["GATA3", "ENSG00000141736"])
        >>> panel.gene_ids
        ['ENSG00000107485', 'ENSG00000141736']
        """
        if genes is None:
            tokens = self.all_tokens()
            return GenePanel(self.names(tokens), tokens, list(self.ensembl_ids))
        if isinstance(genes, str):
            raise GeneError(f"genes must be a list of names, not the text {genes!r}; give [{genes!r}]")
        asked = [str(gene) for gene in genes]
        if not asked:
            raise GeneError("no gene is asked for; name some, or give None for all")
        name_of: dict[int, str] = {}
        repeated = []
        for name, token in zip(asked, self.tokens(asked).tolist(), strict=True):
            if token in name_of:
                repeated.append(name)
            else:
                name_of[token] = name
        if repeated:
            shown = ", ".join(dict.fromkeys(repeated[:5]))
            warn(f"some genes are asked for more than once; each is given once ({shown})")
        tokens = np.array(list(name_of), np.int64)
        return GenePanel(list(name_of.values()), tokens, self.gene_ids(tokens))

    def names(self, tokens: Iterable[int]) -> list[str]:
        """The symbol of each token, or its Ensembl id where it has none."""
        rows = (int(token) - FIRST_GENE_TOKEN for token in tokens)
        return [self.symbols[row] or self.ensembl_ids[row] for row in rows]

    def gene_ids(self, tokens: Iterable[int]) -> list[str]:
        """The Ensembl id of each token."""
        return [self.ensembl_ids[int(token) - FIRST_GENE_TOKEN] for token in tokens]

    def all_tokens(self) -> npt.NDArray[np.int64]:
        """Every gene's token, int64 [number of genes]."""
        return np.arange(FIRST_GENE_TOKEN, self.n_tokens, dtype=np.int64)

    def _candidates(self, name: str) -> list[str]:
        """Names near enough in length and start to be worth comparing."""
        start = name[:1].lower()
        return [n for n in self._token if n[:1].lower() == start and abs(len(n) - len(name)) <= 2]


def _read_json_object(path: Path) -> object:
    """Read JSON; a key that appears twice with two values is an error, where Python would keep the last."""

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        table: dict[str, object] = {}
        for key, value in pairs:
            if table.setdefault(key, value) != value:
                raise VocabularyError(f"{path}: {key!r} appears twice, with {table[key]!r} and {value!r}; keep one")
        return table

    return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=once)


@cache
def _published() -> GeneVocabulary:
    raw = files("stpath_runtime").joinpath("data", PUBLISHED_GENES).read_bytes()
    return GeneVocabulary._from_tsv(lzma.decompress(raw).decode())


def organ_token(name: str | None) -> int:
    """Token of an organ, whatever its case and punctuation; None means Others.

    HEST-1k's and STImage-1K4M's spellings resolve as in the published alignment, with one difference: the published
    table sends 'Ovary' to Others but 'ovary' to Ovary; here both are Ovary.

    Raises
    ------
    InputError
        If the name is unknown; the message gives the nearest ones.
    """
    return _lookup("organ", name if name is not None else DEFAULT_ORGAN, ORGANS, _organ_table())


def technology_token(name: str | None) -> int:
    """Token of a technology, whatever its case and punctuation; None means pad (unknown).

    Raises
    ------
    InputError
        If the name is unknown; the message gives the nearest ones.
    """
    if name is None:
        return TECHNOLOGIES.index(DEFAULT_TECHNOLOGY)
    return _lookup("technology", name, TECHNOLOGIES, _technology_table())


def _lookup(kind: str, name: str, tokens: Sequence[str], table: Mapping[str, int]) -> int:
    if not isinstance(name, str):
        raise SlideError(f"{kind} must be a name or None, not {name!r}")
    token = table.get(_plain(name))
    if token is None:
        known = [t for t in tokens if not t.startswith("<")]
        near = nearest_names(_plain(name), [_plain(t) for t in known], {_plain(t): t for t in known})
        raise SlideError(f"unknown {kind} {name!r}{near}; known: {', '.join(known)}")
    return token


@cache
def _organ_table() -> dict[str, int]:
    table = {_plain(name): ORGANS.index("Others") for name in _ORGANS_WITHOUT_TOKEN}
    return table | {_plain(name): token for token, name in enumerate(ORGANS) if not name.startswith("<")}


@cache
def _technology_table() -> dict[str, int]:
    table = {_plain(alias): TECHNOLOGIES.index(name) for alias, name in _TECHNOLOGY_ALIASES.items()}
    return table | {_plain(name): token for token, name in enumerate(TECHNOLOGIES) if not name.startswith("<")}


def _plain(name: str) -> str:
    """A name without case, spaces and punctuation: 'Visium-HD' -> 'visiumhd'."""
    return re.sub(r"[\W_]+", "", name).casefold()


def nearest_names(name: str, candidates: Iterable[str], shown: Mapping[str, str] | None = None) -> str:
    """' (did you mean A, B?)' for the nearest candidates, or ''."""
    by_case = {candidate.casefold(): candidate for candidate in candidates}
    near = [by_case[n] for n in difflib.get_close_matches(name.casefold(), by_case, n=3, cutoff=0.6)]
    return f" (did you mean {', '.join((shown or {}).get(n, n) for n in near)}?)" if near else ""
