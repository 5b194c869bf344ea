"""How a model is quantized, in one object that is passed, stored and compared."""

from dataclasses import asdict, dataclass, fields

from torch import Tensor

from .float_weights import FloatSpec
from .fp4 import BLOCK_SIZES, FP4Spec, FP4Tensor
from .fp8 import FP8Spec, FP8Tensor
from .gptq import GPTQOptions, check_options, gptq_quantize
from .grid import QuantizedTensor, QuantSpec, quantize_rtn
from .hessian import Hessian
from .nf4 import NF4Spec, NF4Tensor, quantize_nf4

Spec = QuantSpec | NF4Spec | FP4Spec | FP8Spec
Quantized = QuantizedTensor | NF4Tensor | FP4Tensor | FP8Tensor
METHODS = ("gptq", "rtn", "nf4")
GRID = QuantSpec(bits=4, group_size=64)


@dataclass(frozen=True)
class Recipe:
    """To which levels weights are rounded, how (NF4 for an NF4Spec; for another spec GPTQ with
    options, to nearest without), and which layers."""

    spec: Spec = GRID
    options: GPTQOptions | None = None
    targets: str | tuple[str, ...] = "all"  # linears, as find_linears takes them

    def __post_init__(self):
        if isinstance(self.spec, NF4Spec) and self.options is not None:
            raise ValueError("NF4 rounds to nearest; options of GPTQ do not go with an NF4Spec")
        if self.options is not None:
            check_options(self.spec, self.options)

    @classmethod
    def of(
        cls, spec: Spec = GRID, method: str | None = None, options: GPTQOptions | None = None,
        targets: str | tuple[str, ...] = "all",
    ) -> "Recipe":  # fmt: skip
        """The recipe that a method makes of a spec; None: NF4 for its spec, else GPTQ. Raises
        ValueError for an unknown method, and for a spec or options that it does not have."""
        method = method or ("nf4" if isinstance(spec, NF4Spec) else "gptq")
        if method not in METHODS:
            raise ValueError(f"method={method!r} must be one of {', '.join(METHODS)}")
        if (method == "nf4") != isinstance(spec, NF4Spec):
            raise ValueError(f"method={method!r} does not go with {spec}")
        if method == "gptq":
            return cls(spec, options or GPTQOptions(), targets)
        if options is not None and (changed := options.changed()):
            raise ValueError(f"method={method!r} has no {', '.join(changed)}; 'gptq' has")
        return cls(spec, None, targets)

    @property
    def method(self) -> str:
        """ "gptq", "rtn" or "nf4"."""
        if isinstance(self.spec, NF4Spec):
            return "nf4"
        return "rtn" if self.options is None else "gptq"

    @property
    def needs_halves(self) -> bool:
        """Whether GPTQ chooses its damping from halves of the calibration tokens."""
        return self.options is not None and self.options.needs_halves

    @property
    def matches_dense(self) -> bool:
        """Whether GPTQ aims at the dense model's outputs."""
        return self.options is not None and self.options.match_dense

    def quantize(
        self, weight: Tensor, hessian: Hessian | None = None, largest: float | None = None
    ) -> Quantized:
        """One weight (out_features, in_features), packed. GPTQ takes the layer's Hessian. largest:
        the absmax of all weights that share an NVFP4 tensor scale; None: of this one."""
        if isinstance(self.spec, NF4Spec):
            return quantize_nf4(weight, self.spec.block_size, self.spec.double_quant)
        if self.options is not None:
            return gptq_quantize(weight, hessian, self.spec, self.options, largest)
        if isinstance(self.spec, FloatSpec):
            return self.spec.quantize(weight, largest)
        return quantize_rtn(weight, self.spec)

    def as_json(self) -> dict:
        """As recipe.json holds it: method, spec, and what is not the default's."""
        said = {"method": self.method, "spec": asdict(self.spec)}
        if self.targets != "all":
            said["targets"] = self.targets if isinstance(self.targets, str) else list(self.targets)
        return said | (self.options.changed() if self.options else {})

    @classmethod
    def from_json(cls, said: dict) -> "Recipe":
        """The recipe in what `as_json` gave; other entries of `said` do not matter. Raises
        ValueError for what is none."""
        names = {f.name for f in fields(GPTQOptions)}
        try:
            options = GPTQOptions(**{k: v for k, v in said.items() if k in names})
            targets = said.get("targets", "all")
            targets = targets if isinstance(targets, str) else tuple(targets)
            kind = NF4Spec if said["method"] == "nf4" else QuantSpec
            if form := said["spec"].get("format"):
                kind = FP4Spec if form in BLOCK_SIZES else FP8Spec
            return cls.of(kind(**said["spec"]), said["method"], options, targets)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"this is no recipe of a quantization: {error!r}") from None
