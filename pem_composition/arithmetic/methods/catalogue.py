"""The merging methods and their settings, as data; ``registry`` looks them up. No torch.

Notation: dW_t is the update of module t times its coefficient, T the number of modules, r_t the
ranks; M_t are the updates in the shared core (``core``), top the entries of largest magnitude.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from pem_composition.arithmetic.methods.settings import Setting
from pem_composition.arithmetic.statistics import FISHER, GRAM, SUBSPACE
from pem_composition.config import ADAPTER_KINDS, KINDS

SIMPLE, SUM = "simple", "sum"  # the plain sum: as a way of merging, and in records and searches
PEFT_LINEAR = "peft_linear"
REFERENCE_DETOXIFY = "reference_detoxify"
LORA = ("lora",)
SUM_OF_RANKS = "at most sum r_t"


def _density(default: float, meaning: str = "share of the entries that is kept") -> Setting:
    return Setting("density", default, meaning, 0.0, 1.0, low_open=True)


SEED = Setting("seed", 0, "of the random choices", 0)
ELECTION = Setting(
    "election",
    "total",
    "the sign of an entry is that of the sum of its values, or of the majority of its signs",
    choices=("total", "frequency"),
)
FORM = Setting(
    "form",
    "dense",
    "coordinates: the entries of dW itself, as published, or of the shared core",
    choices=("dense", "core"),
    kinds=LORA,
)
RIDGE = Setting(
    "ridge", 0.1, "e as a share of the mean eigenvalue of sum_t w_t dW_t^T dW_t; 0: as published",
    0.0,
)  # fmt: skip


@dataclass(frozen=True)
class Method:
    """One merging method.

    Args:
        rule: the equation in one line.
        acts_on: the coordinates in which it acts.
        default: coefficient of each module where none is given; None for 1/T.
        shares: True where only the ratios of the coefficients count, c_t / sum_s c_s >= 0.
        rank: of the result, without a rank of its own choice.
        home: file and function in this package.
        space: delta where it merges updates, parameter where it merges the modules' own tensors.
        own_rank: True where --rank is a parameter of the method, not a truncation of its result.
        levels: True where the result has equal singular values, so that the method itself says
            which of them --rank keeps.
        modules: smallest and greatest number of modules.
        needs: kind of statistics that every module brings, see ``arithmetic.statistics``.
    """

    name: str
    title: str
    source: str
    rule: str
    acts_on: str
    rank: str
    home: str
    settings: tuple[Setting, ...] = ()
    kinds: tuple[str, ...] = KINDS
    default: float | None = None
    shares: bool = False
    space: str = "delta"
    own_rank: bool = False
    levels: bool = False
    modules: tuple[int, int] = (1, 1000)
    needs: str = ""

    @property
    def random(self) -> bool:
        """True where the result depends on a seed."""
        return any(s.name == SEED.name for s in self.settings)

    def function(self, name: str = "") -> Any:
        """The code, or another function of its file; imports torch."""
        file, own = self.home.split(":")
        return getattr(import_module(f"pem_composition.arithmetic.methods.{file}"), name or own)


ENTRIES = "entries of dW_t (form=dense) or of M_t (form=core); of l - 1, of delta"
ENTRY_RANK = f"dense: best rank sum r_t; core: {SUM_OF_RANKS}"

ELEMENTWISE = (
    Method(
        "magnitude", "magnitude pruning", "arXiv:1506.02626",
        "sum_t top(dW_t)", ENTRIES, ENTRY_RANK, "magnitude:magnitude", (_density(0.2), FORM),
    ),
    Method(
        "ties", "TIES", "arXiv:2306.01708",
        "mean over {t: sign top(dW_t) = elected sign} of top(dW_t)", ENTRIES, ENTRY_RANK,
        "ties:ties", (_density(0.2), ELECTION, FORM), default=1.0,
    ),
    Method(
        "dare", "DARE", "arXiv:2311.03099",
        "sum_t dW_t * m_t / density, m_t ~ Bernoulli(density)", ENTRIES, ENTRY_RANK, "dare:dare",
        (_density(0.5), SEED, FORM),
    ),
    Method(
        "dare_ties", "DARE-TIES", "arXiv:2311.03099",
        "DARE's dW_t * m_t / density, then the elected mean of TIES", ENTRIES, ENTRY_RANK,
        "dare:dare_ties", (_density(0.5), ELECTION, SEED, FORM), default=1.0,
    ),
    Method(
        "della", "DELLA", "arXiv:2406.11617",
        "dW_t * m_t / p, p from density - epsilon/2 to density + epsilon/2 by rank of abs(dW_t) "
        "in its row; then the elected mean of TIES", ENTRIES, ENTRY_RANK, "della:della",
        (
            _density(0.5, "mean share of the entries that is kept"),
            Setting("epsilon", 0.1, "spread of the probabilities", 0.0, 1.0),
            ELECTION, SEED, FORM,
        ), default=1.0,
    ),
    Method(
        "breadcrumbs", "Model Breadcrumbs", "arXiv:2312.06795",
        "sum_t dW_t without its largest and its smallest entries", ENTRIES, ENTRY_RANK,
        "breadcrumbs:breadcrumbs",
        (
            _density(0.15),
            Setting("gamma", 0.01, "share of the entries dropped as the largest", 0.0, 1.0), FORM,
        ),
    ),
    Method(
        "sce", "SCE", "arXiv:2408.07990",
        "entries of greatest variance over t, minority signs erased, averaged with weights "
        "proportional to sum dW_t^2", ENTRIES, ENTRY_RANK, "sce:sce",
        (_density(0.1, "share of the entries that is selected"), FORM),
        default=1.0,
    ),
    Method(
        "negmerge", "NegMerge, to be negated", "arXiv:2410.05583",
        "1/T sum_t dW_t where the signs of all dW_t agree, else 0", ENTRIES, ENTRY_RANK,
        "negmerge:negmerge", (FORM,), default=1.0,
    ),
)  # fmt: skip
INNER = tuple(m.name for m in ELEMENTWISE)

SPECTRAL = (
    Method(
        "tsv", "TSV-M", "arXiv:2412.00081",
        "P diag(S_1 ... S_T) Q^T, P and Q the orthogonal matrices next to [U_1 ... U_T] and "
        "[V_1 ... V_T] of dW_t = U_t S_t V_t^T", "singular vectors of dW_t, k = r_t", SUM_OF_RANKS,
        "tsv:tsv", kinds=LORA, default=1.0,
    ),
    Method(
        "iso_c", "Iso-C", "arXiv:2502.04959",
        "mean(S) U V^T, sum_t dW_t = U S V^T", "singular vectors of sum_t M_t",
        "rank of sum_t dW_t", "iso:iso_c", kinds=LORA, default=1.0, levels=True,
    ),
    Method(
        "iso_cts", "Iso-CTS", "arXiv:2502.04959",
        "the leading directions of sum_t dW_t and of each remainder, orthogonalised, with their "
        "mean singular value", "singular vectors of M_t", SUM_OF_RANKS, "iso:iso_cts",
        (Setting("common", 0.8, "share of directions taken from the sum", 0.0, 1.0),),
        kinds=LORA, default=1.0, levels=True,
    ),
    Method(
        "wudi", "WUDI, closed form", "arXiv:2503.08099",
        "ACTMat with weight 1 / norm(dW_t)^2 for module t", "M_t, input coordinates", SUM_OF_RANKS,
        "wudi:wudi", (RIDGE,), kinds=LORA, default=1.0,
    ),
    Method(
        "actmat", "ACTMat", "arXiv:2604.01329",
        "(sum_t dW_t dW_t^T dW_t + e S) (sum_t dW_t^T dW_t + e I)^-1, S = sum_t dW_t",
        "M_t, input coordinates", SUM_OF_RANKS, "wudi:actmat", (RIDGE,), kinds=LORA, default=1.0,
    ),
)  # fmt: skip

OTHERS = (
    Method(
        "slerp", "SLERP", "Shoemake 1985 (SIGGRAPH)",
        "(1-w) abs(a) + w abs(b) along the great circle from a to b, w = c_b / (c_a + c_b)",
        "dW_t as one vector per layer", "sum r_t", "sphere:slerp", shares=True, modules=(2, 2),
    ),
    Method(
        "karcher", "Karcher mean", "Karcher 1977 (CPAM 30)",
        "the point of the sphere with sum_t w_t log(dW_t) = 0, w_t = c_t / sum c, times "
        "sum_t w_t norm(dW_t)", "dW_t as one vector per layer", "sum r_t", "sphere:karcher",
        shares=True,
    ),
    Method(
        "knots", "KnOTS", "arXiv:2410.19735",
        "U f(S V_1^T, ..., S V_T^T), [dW_1 ... dW_T] = U S [V_1^T ... V_T^T]",
        "entries of S V_t^T, input coordinates", SUM_OF_RANKS, "knots:knots",
        (Setting("inner", "ties", "the method f", choices=(*INNER, SIMPLE)),), kinds=LORA,
    ),
    Method(
        "ctm", "compress-then-merge", "github.com/ZhengbaoHe/compress-then-merge",
        "U f(U^T dW_1 V, ..., U^T dW_T V) V^T, U and V the best shared bases of R columns",
        "entries or singular vectors of U^T dW_t V", "R (default: the largest r_t)", "ctm:ctm",
        (
            Setting(
                "inner", "ties", "the method f",
                choices=(*INNER, *(m.name for m in SPECTRAL), SIMPLE),
            ),
            Setting(
                "beta", 0.0, "bases for updates of norm beta norm(dW_t) + (1 - beta) mean norm",
                0.0, 1.0,
            ),
        ), kinds=LORA, own_rank=True,
    ),
    Method(
        "svc", "SVC, singular value calibration", "arXiv:2602.05536",
        "sum_r s_r / mean_t(max(alpha, p_rt)) u_r v_r^T, f = sum_r s_r u_r v_r^T, p_rt how often f "
        "counts what dW_t does along u_r", "singular vectors of f(M_1, ..., M_T)", SUM_OF_RANKS,
        "svc:svc",
        (
            Setting(
                "inner", SIMPLE, "the method f", choices=(SIMPLE, "tsv", "wudi", "actmat")
            ),
            Setting("alpha", 0.1, "the least p_rt; with 1 nothing grows", 0.0, 1.0),
        ), kinds=LORA, default=1.0,
    ),
    Method(
        "robustmerge", "RobustMerge", "arXiv:2502.17159",
        "sum_t top(B_t) diag(S_t / sum_s S_s) top(A_t), S_t = row sums of abs(A_t) over those of "
        "abs(top(A_t))", "entries of the factors as they are stored", "sum r_t",
        "factors:robustmerge", (_density(0.2),), kinds=LORA, default=1.0,
    ),
    Method(
        "lego", "LoRA-LEGO", "arXiv:2409.16167",
        "K-means of the rows [a_k; b_k] of all factors; centroids at their members' norm, "
        "sqrt(r/R)", "rank-one units of the factors as they are stored",
        "R (default: the largest r_t)", "factors:lego", (SEED,), kinds=LORA, default=1.0,
        own_rank=True,
    ),
)  # fmt: skip

INFORMED = (
    Method(
        "fisher", "Fisher merging", "arXiv:2111.09832",
        "t = sum_i c_i F_i t_i / sum_i c_i F_i, F_i the diagonal Fisher of module i on its task",
        "entries of the modules' own tensors", "r (equal ranks)", "fisher_average:fisher",
        (
            Setting(
                "floor", 1e-6, "an entry of F_i counts at least as this share of the mean of F_i",
                0.0, 1.0, low_open=True,
            ),
            Setting(
                "normalize", "none", "norm: divide each F_i by its norm", choices=("none", "norm")
            ),
        ),
        shares=True, space="parameter", needs=FISHER,
    ),
    Method(
        "regmean", "RegMean", "arXiv:2212.09849",
        "(sum_i c_i dW_i G_i) (sum_i c_i G_i)^-1, G_i the Gram matrix of the layer's inputs on the "
        "module's task", "dW_t, input coordinates", "sum r_t", "regmean:regmean",
        (
            Setting(
                "off_diagonal", 0.9, "factor of the entries of G_i outside its diagonal", 0.0, 1.0
            ),
        ),
        kinds=LORA, shares=True, needs=GRAM,
    ),
    Method(
        "ssr", "SSR-Merge", "arXiv:2606.10617",
        "RegMean among the updates B A, A = [A_1; ...; A_T]: B = [w_1 B_1 ...] Q (G + e I)^-1, "
        "G = sum_i c_i A G_i A^T, rows i of Q those of c_i A G_i A^T",
        "the factors' rows as they are stored", "sum r_t", "ssr:ssr",
        (Setting("ridge", 1e-4, "e as a share of the mean diagonal of G", 0.0),),
        kinds=LORA, shares=True, needs=SUBSPACE,
    ),
)  # fmt: skip

PARITY = (
    Method(
        "reference", "the paper's merge program", "github.com/hkust-nlp/PEM_composition",
        "t = sum_i c_i t_i / sum_i c_i for every tensor", "the modules' own tensors",
        "r (equal ranks)", "parity:reference", space="parameter",
    ),
    Method(
        PEFT_LINEAR, "PEFT's linear", "PEFT 0.19 to 0.21",
        "A = sum sgn(c_i) sqrt(abs(c_i s_i)) A_i, B = sum sqrt(abs(c_i s_i)) B_i; l = sum c_i l_i",
        "the modules' own tensors", "r (equal ranks)", "parity:peft_linear",
        kinds=ADAPTER_KINDS, space="parameter",
    ),
    Method(
        "adapters_linear", "adapters' linear", "adapters 1.2.0",
        "t = sum_i c_i t_i, with the c_i divided by their sum unless normalize=false",
        "the modules' own tensors", "r (equal ranks)", "parity:adapters_linear",
        (
            Setting(
                "normalize", "true", "divide the coefficients by their sum",
                choices=("true", "false"),
            ),
        ),
        kinds=ADAPTER_KINDS, space="parameter",
    ),
)  # fmt: skip

DETOXIFICATION = (
    Method(
        "ext_sub", "Ext-Sub, extraction before subtraction", "arXiv:2308.08090",
        "row by row a - ext(b), ext(b) = b - <u, b> u / norm(u)^2, u = a / norm(a) + b / norm(b), "
        "a of the expert dW_1, b of the anti-expert dW_2", "rows of dW_t; vectors are one row",
        "r_1 + r_2", "ext_sub:ext_sub", default=1.0, modules=(2, 2),
    ),
    Method(
        REFERENCE_DETOXIFY, "the paper's code for detoxification",
        "github.com/hkust-nlp/PEM_composition",
        "A = c_1 A_1 + c_2 A_2, B = c_1 B_1 - c_2 B_2; of strength s: c = (1 + s, -s)",
        "the modules' own tensors", "r (equal ranks)", "parity:reference_detoxify", kinds=LORA,
        space="parameter", modules=(2, 2),
    ),
)  # fmt: skip

METHODS: Mapping[str, Method] = {
    m.name: m
    for m in (
        Method(
            SIMPLE, "the plain sum, task arithmetic", "arXiv:2212.04089",
            "sum_t dW_t (in parameter space: the sum of the tensors, arXiv:2306.14870)",
            "the updates, or the modules' own tensors",
            "sum r_t", "",
        ),
        *ELEMENTWISE, *SPECTRAL, *OTHERS, *INFORMED, *PARITY, *DETOXIFICATION,
    )
}  # fmt: skip
