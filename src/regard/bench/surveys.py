"""What three surveys of efficient attention cover, and how much of it is here: a view over the cards.

A survey's methods are named by their papers, and a card that cites such a paper first is that method. So nothing here
knows a mechanism, and one that is added is found. What no card cites is listed as not built.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from regard import index
from regard.checks import refuse

FREE = "*"
"""Behind a method's name: for models trained without it."""


@dataclass(frozen=True)
class Method:
    """One that a survey covers."""

    name: str
    paper: str
    """As cards cite it: an arXiv id, or where else it appeared."""
    free: bool = False
    """Whether it is put into trained models, so that training with it says little."""

    @property
    def cards(self) -> list[index.Entry]:
        """What is built of it, by name."""
        found = (e for e in index.entries() if e["papers"] and e["papers"][0]["ref"] == self.paper)
        return sorted((e for e in found if e["form"] != "function"), key=lambda e: str(e["name"]))


@dataclass(frozen=True)
class Survey:
    """A paper that compares attention mechanisms, and what it covers, by its own classes."""

    title: str
    authors: str
    year: int
    ref: str
    read: str
    covers: Mapping[str, tuple[Method, ...]]

    @property
    def cited(self) -> str:
        return f"{self.title}. {self.authors}, {self.year}, {self.ref}. Read: {self.read}."

    def methods(self, only: str = "") -> Iterator[tuple[str, Method]]:
        """(class, method) of all classes, or of those that have `only` in their name."""
        chosen = [kind for kind in self.covers if only.lower() in kind.lower()]
        if not chosen:
            refuse("survey", "only", "is in no class's name", repr(only), f"a part of one of {', '.join(self.covers)}")
        return ((kind, method) for kind in chosen for method in self.covers[kind])


def _of(text: str) -> tuple[Method, ...]:
    """'Reformer 2001.04451, Quest* 2406.10774': name and paper of each; * = for trained models."""
    found = []
    for part in text.split(","):
        name, _, paper = part.strip().rpartition(" ")
        found.append(Method(name.rstrip(FREE), paper, name.endswith(FREE)))
    return tuple(found)


SURVEYS = {
    "practical": Survey(
        "A Practical Survey on Faster and Lighter Transformers",
        "Fournier, Caron, Aloise",
        2021,
        "arXiv 2103.14636",
        "abstract; its list from memory",
        {
            "fixed patterns": _of(
                "Sparse Transformer 1904.10509, Star-Transformer 1902.09113, Longformer 2004.05150, BigBird 2007.14062"
            ),
            "learned patterns": _of("Reformer 2001.04451, Routing Transformer 2003.05997, Sparse Sinkhorn 2002.11296"),
            "low rank": _of("Linformer 2006.04768, Nystromformer 2102.03902"),
            "kernels": _of("Linear Transformer 2006.16236, Performer 2009.14794, Random Feature Attention 2103.02143"),
            "no dot products": _of("Synthesizer 2005.00743, FNet 2105.03824, gMLP 2105.08050, MLP-Mixer 2105.01601"),
            "adaptive span": _of("Adaptive Span 1905.07799, Adaptively Sparse 1909.00015"),
            "memory and recurrence": _of(
                "Transformer-XL 1901.02860, Compressive Transformer 1911.05507, Feedback 2002.09402, Funnel 2006.03236"
            ),
        },
    ),
    "efficient": Survey(
        "Efficient Transformers: A Survey",
        "Tay, Dehghani, Bahri, Metzler",
        2020,
        "arXiv 2009.06732",
        "abstract; its taxonomy from memory",
        {
            "fixed pattern": _of("Image Transformer 1802.05751, Sparse Transformer 1904.10509, Axial 1912.12180"),
            "fixed pattern, memory": _of(
                "Memory Compressed 1801.10198, Longformer 2004.05150, ETC 2004.08483, Big Bird 2007.14062,"
                "Poolingformer 2105.04371"
            ),
            "learnable pattern": _of(
                "Reformer 2001.04451, Routing Transformer 2003.05997, Sinkhorn 2002.11296, Clusterformer 2009.06097"
            ),
            "neural memory": _of("Set Transformer 1810.00825, Perceiver 2103.03206, Luna 2106.01540"),
            "recurrence": _of("Transformer-XL 1901.02860, Compressive Transformer 1911.05507"),
            "low rank": _of(
                "Linformer 2006.04768, Synthesizer 2005.00743, Nystromformer 2102.03902, Long-Short 2107.02192"
            ),
            "kernel": _of("Performer 2009.14794, Linear Transformer 2006.16236, Random Feature Attention 2103.02143"),
            "downsampling": _of("Funnel 2006.03236, TokenLearner 2106.11297"),
        },
    ),
    "llm": Survey(
        "Efficient Attention Mechanisms for Large Language Models: A Survey",
        "Sun, Li, Zhang, Pan, Dong, Guo, Wang",
        2025,
        "arXiv 2507.19595",
        "abstract; its lists inferred",
        {
            "linear, kernel": _of(
                "Linear Transformer 2006.16236, Performer 2009.14794, RFA 2103.02143, cosFormer 2202.08791,"
                "Hedgehog 2402.04347, Based 2402.18668, GAU 2202.10447, Lightning 2307.14995"
            ),
            "linear, recurrent with decay": _of(
                "RetNet 2307.08621, GLA 2312.06635, Mamba 2312.00752, Mamba-2 2405.21060, HGRN2 2404.07904,"
                "RWKV-4 2305.13048, RWKV-6 2404.05892, mLSTM 2405.04517, GSA 2409.07146"
            ),
            "linear, fast weights": _of(
                "DeltaNet 2406.06484, Gated DeltaNet 2412.06464, KDA 2510.26692, TTT 2407.04620, Titans 2501.00663"
            ),
            "sparse, fixed": _of(
                "Sparse Transformer 1904.10509, StreamingLLM* 2309.17453, LongNet 2307.02486, MInference* 2407.02490"
            ),
            "sparse, routing": (
                *_of(
                    "MoBA 2502.13189, NSA 2502.11089, SeerAttention 2410.13276, Quest* 2406.10774, InfLLM* 2402.04617,"
                    "FlexPrefill* 2502.20766, XAttention* 2503.16428"
                ),
                Method("DSA", "DeepSeek's report on V3.2-Exp"),
            ),
            "sparse, clustering and retrieval": _of(
                "Reformer 2001.04451, Routing Transformer 2003.05997, RetrievalAttention* 2409.10516,"
                "ClusterKV* 2412.03213, MagicPIG* 2410.16179"
            ),
            "cache eviction": _of("H2O* 2306.14048, SnapKV* 2404.14469, TOVA* 2401.06104"),
            "latent and shared caches": _of("MQA 1911.02150, GQA 2305.13245, MLA 2405.04434, YOCO 2405.05254"),
            "softmax with gates": _of(
                "Forgetting Transformer 2503.02130, Differential 2410.05258, PaTH 2505.16381, Gated 2505.06708"
            ),
            "hybrids": _of("Jamba 2403.19887, Samba 2406.07522, Griffin 2402.19427, MiniMax-01 2501.08313"),
        },
    ),
}


def survey(name: str) -> Survey:
    """Raises ValueError, listing those there are, for any other name."""
    if name not in SURVEYS:
        raise ValueError(index.unknown("survey", name, SURVEYS))
    return SURVEYS[name]


@dataclass(frozen=True)
class Row:
    """A method of a survey, and one card of it: None where nothing is built."""

    kind: str
    method: Method
    card: index.Entry | None


def rows(name: str, only: str = "", fits: Callable[[index.Entry], bool] = lambda card: True) -> list[Row]:
    """Every method with each of its cards that fits; with None where there is none."""
    found = []
    for kind, method in survey(name).methods(only):
        cards: list[index.Entry | None] = [card for card in method.cards if fits(card)]
        found += [Row(kind, method, card) for card in cards or [None]]
    return found
