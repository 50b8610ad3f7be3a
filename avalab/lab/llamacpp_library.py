"""llama.cpp's C functions by ctypes, in whichever build of it is here: nobody needs a compiler.

| build | where it comes from | |
|---|---|---|
| `npm` | the asset llamacpp-linux-x64 | kernels for each generation of x86 processors; quantises to K types |
| `python` | llama-cpp-python, `make setup-llamacpp` | compiled for this machine; quantises, too |
| `xllamacpp` | a wheel for most systems | for processors with AVX2; its module exports all but the quantiser |

1. `find` gives the first build of this table that is here, or the one asked for; `opened` opens it, once a process. Two
   builds whose libraries have the same names cannot be open in one process, and the second is refused.
2. Releases add fields to the ends and middles of their parameters. Declared here is the beginning of each structure, as
   far as something is set; the rest is room that the library fills and reads itself. What it fills is compared with
   the known defaults: a release whose fields have moved is refused, not believed.
3. `Model` is a file, opened for one sequence or several: tokens in, logits out. Several sequences are read in one
   batch, and share the cells of a beginning that they have in common. What llama.cpp reports as an error while it
   opens a file explains the refusal.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import platform
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from avalab.lab import assets
from avalab.lab.errors import InputError, ProcessFailed, Unavailable

NPM_ASSET = "llamacpp-linux-x64"

WHEEL = "xllamacpp"

INSTALL = f'python -m avalab.lab.assets {NPM_ASSET} (Linux on x86), or pip install "{WHEEL}", or make setup-llamacpp'

F16, Q8_0 = 1, 8  # of ggml's types

ERROR = 4  # of ggml's log levels

FLASH_ATTENTION = 1


@dataclass(frozen=True)
class Build:
    """llama.cpp as somebody built it: the library with its functions, and where its kernels lie, if apart."""

    name: str
    version: str
    library: Path
    kernels: Path | None = None

    @property
    def shown(self) -> str:
        """`npm llama.cpp 3.22.1`."""
        return f"{self.name} llama.cpp {self.version}"


def _npm() -> Build | None:
    if not (sys.platform == "linux" and platform.machine() == "x86_64"):
        return None
    folder = assets.verified(NPM_ASSET)
    version = assets.known_assets()[NPM_ASSET].files[0].parts[0].version
    return Build("npm", version, next(folder.glob("libllama.*so")), folder) if folder else None


def _python() -> Build | None:
    return _of_package("python", "llama_cpp", "llama-cpp-python", "lib/libllama.*")


def _wheel() -> Build | None:
    return _of_package(WHEEL, WHEEL, WHEEL, f"{WHEEL}*.so")


def _of_package(name: str, module: str, distribution: str, pattern: str) -> Build | None:
    spec = importlib.util.find_spec(module)
    found = sorted(Path(spec.origin).parent.glob(pattern)) if spec and spec.origin else []
    return Build(name, metadata.version(distribution), found[0]) if found else None


BUILDS: dict[str, Callable[[], Build | None]] = {"npm": _npm, "python": _python, "xllamacpp": _wheel}

QUANTISERS = ("npm", "python")


def find(name: str = "", *, among: tuple[str, ...] = ()) -> Build:
    """The build of this name, or the first that is here. Raises ValueError for an unknown one, Unavailable for none."""
    if name and name not in BUILDS:
        raise InputError(f"no build {name!r} of llama.cpp; choose one of {', '.join(BUILDS)}")
    names = (name,) if name else among or tuple(BUILDS)
    for build in (BUILDS[one]() for one in names):
        if build:
            return build
    raise Unavailable(f"llama.cpp ({' or '.join(names)}) is not here; get it: {INSTALL}")


# --- the library -----------------------------------------------------------------------------------------------------


class _ModelParameters(ctypes.Structure):
    _fields_ = (
        ("devices", ctypes.c_void_p),
        ("tensor_buft_overrides", ctypes.c_void_p),
        ("n_gpu_layers", ctypes.c_int32),
        ("split_mode", ctypes.c_int32),
        ("rest", ctypes.c_uint8 * 256),
    )


class _ContextParameters(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max")),
        *((name, ctypes.c_uint32) for name in ("n_rs_seq", "n_outputs_max", "n_outputs_max_per_seq")),
        *((name, ctypes.c_int32) for name in ("n_threads", "n_threads_batch")),
        *((name, ctypes.c_int32) for name in ("ctx_type", "rope_scaling", "pooling", "attention", "flash_attention")),
        ("rope_and_yarn", ctypes.c_float * 6),
        ("yarn_orig_ctx", ctypes.c_uint32),
        ("defrag_thold", ctypes.c_float),
        ("cb_eval", ctypes.c_void_p),
        ("cb_eval_user_data", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("type_k", "type_v")),
        ("rest", ctypes.c_uint8 * 256),
    )


class _QuantiseParameters(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("nthread", "ftype", "output_tensor_type", "token_embedding_type")),
        ("flags", ctypes.c_bool * 6),
        ("imatrix", ctypes.c_void_p),
        ("rest", ctypes.c_uint8 * 256),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")),
    )


class _ColumnImportance(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int32

PROTOTYPES: dict[str, tuple] = {  # result, then arguments
    "llama_backend_init": (None,),
    "llama_log_set": (None, _LOG, _POINTER),
    "llama_print_system_info": (ctypes.c_char_p,),
    "llama_model_default_params": (_ModelParameters,),
    "llama_context_default_params": (_ContextParameters,),
    "llama_model_load_from_file": (_POINTER, ctypes.c_char_p, _ModelParameters),
    "llama_model_free": (None, _POINTER),
    "llama_model_get_vocab": (_POINTER, _POINTER),
    "llama_vocab_n_tokens": (_INT, _POINTER),
    "llama_tokenize": (_INT, _POINTER, ctypes.c_char_p, _INT, _POINTER, _INT, ctypes.c_bool, ctypes.c_bool),
    "llama_init_from_model": (_POINTER, _POINTER, _ContextParameters),
    "llama_free": (None, _POINTER),
    "llama_get_memory": (_POINTER, _POINTER),
    "llama_memory_clear": (None, _POINTER, ctypes.c_bool),
    "llama_memory_seq_rm": (ctypes.c_bool, _POINTER, _INT, _INT, _INT),
    "llama_memory_seq_cp": (None, _POINTER, _INT, _INT, _INT, _INT),
    "llama_decode": (_INT, _POINTER, _Batch),
    "llama_get_logits": (_POINTER, _POINTER),
}

QUANTISER_PROTOTYPES: dict[str, tuple] = {
    "llama_model_quantize_default_params": (_QuantiseParameters,),
    "llama_model_quantize": (_INT, ctypes.c_char_p, ctypes.c_char_p, _POINTER),
}

DEFAULTS = {  # what a library of a known layout fills in
    "llama_context_default_params": {
        "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_threads": 4, "n_threads_batch": 4,
        "type_k": F16, "type_v": F16,
    },
    "llama_model_default_params": {"devices": None, "split_mode": 1},
    "llama_model_quantize_default_params": {"nthread": 0, "imatrix": None},
}  # fmt: skip


FLAGS = b"\0\1\1\1\1\0"  # embeddings, offload_kqv, no_perf, op_offload, swa_full, kv_unified as a library fills them in


@dataclass(frozen=True, eq=False)
class Library:
    """An open build: its functions under their own names in `call`, what it complained of in `errors`."""

    build: Build
    call: ctypes.CDLL
    errors: list[str]
    log: object  # the callback lives as long as the library

    def why(self) -> str:
        """What was complained of since the last question, in one line."""
        lines = " ".join("".join(self.errors).split())
        self.errors.clear()
        return lines[-400:]


_OPEN: dict[str, Library] = {}


def opened(build: Build) -> Library:
    """The build's library. Raises Unavailable for one that cannot be opened, or beside another of the same names."""
    if build.name in _OPEN:
        return _OPEN[build.name]
    if others := [name for name in _OPEN if WHEEL not in (name, build.name)]:
        raise Unavailable(f"the build {others[0]} of llama.cpp is open in this process; open {build.name} in another")
    try:
        call = ctypes.CDLL(str(build.library))
        _declare(call, PROTOTYPES)
        if hasattr(call, "llama_model_quantize"):
            _declare(call, QUANTISER_PROTOTYPES)
        _check_layout(call)
    except (OSError, AttributeError, ValueError) as error:
        raise Unavailable(f"{build.shown} cannot be used: {error}; take another build: {INSTALL}") from error
    errors: list[str] = []

    @_LOG
    def log(level: int, text: bytes, _) -> None:
        if level == ERROR:
            errors.append(text.decode(errors="replace"))

    call.llama_log_set(log, None)
    if build.kernels:
        ggml = ctypes.CDLL(str(next(build.kernels.glob("libggml.*so"))))
        ggml.ggml_backend_load_all_from_path.argtypes = (ctypes.c_char_p,)
        ggml.ggml_backend_load_all_from_path(str(build.kernels).encode())
    call.llama_backend_init()
    _OPEN[build.name] = Library(build, call, errors, log)
    return _OPEN[build.name]


def _declare(call: ctypes.CDLL, prototypes: dict[str, tuple]) -> None:
    for name, (result, *arguments) in prototypes.items():
        function = getattr(call, name)
        function.restype, function.argtypes = result, arguments


def _check_layout(call: ctypes.CDLL) -> None:
    """Raise ValueError naming a parameter whose default is not where it is looked for."""
    for name, known in DEFAULTS.items():
        if not hasattr(call, name):
            continue
        filled = getattr(call, name)()
        for field, value in known.items():
            if getattr(filled, field) != value:
                raise ValueError(f"{name} gives {field} {getattr(filled, field)}, not {value}: another layout")


@functools.cache
def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- a model ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Tokens of one sequence to be read at `place` tokens after its beginning; logits after the `wanted` last."""

    sequence: int
    place: int
    tokens: list[int]
    wanted: int = 1


class Model:
    """A GGUF file opened for sequences of at most `context` tokens in all, `batch` of which are read at once.

    Raises ValueError with llama.cpp's own words for a file that it refuses, Unavailable for several sequences where the
    library's parameters are laid out in an unknown way.
    """

    def __init__(
        self,
        library: Library,
        file: Path,
        *,
        context: int,
        batch: int,
        threads: int,
        gpu_layers: int = 0,
        cache_type: int = F16,
        sequences: int = 1,
    ) -> None:
        self.library, call = library, library.call
        held: list[tuple[Callable, int]] = []  # what is freed, the last first
        self._release = weakref.finalize(self, _free, held)
        parameters = call.llama_model_default_params()
        parameters.n_gpu_layers = gpu_layers
        library.errors.clear()
        model = call.llama_model_load_from_file(str(file).encode(), parameters)
        if not model:
            raise InputError(f"llama.cpp cannot read {file}: {library.why() or 'it does not say why'}")
        held.append((call.llama_model_free, model))
        parameters = call.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = context, batch, batch
        parameters.n_threads = parameters.n_threads_batch = threads or processors()
        parameters.type_k = parameters.type_v = cache_type
        if cache_type == Q8_0:
            parameters.flash_attention = FLASH_ATTENTION
        if sequences > 1:
            parameters.n_seq_max = sequences
            parameters.rest[_flag_of_one_cache(parameters, library)] = 1
        self.batch = batch
        self._context = call.llama_init_from_model(model, parameters)
        if not self._context:
            self.close()
            raise InputError(
                f"llama.cpp cannot open {file} for {context} tokens: {library.why() or 'it does not say why'}"
            )
        held.append((call.llama_free, self._context))
        self._vocab = call.llama_model_get_vocab(model)
        self.vocabulary = call.llama_vocab_n_tokens(self._vocab)

    def clear(self) -> None:
        """Forget the tokens that were read."""
        self.library.call.llama_memory_clear(self.library.call.llama_get_memory(self._context), True)

    def forget_from(self, place: int) -> bool:
        """Forget the tokens from this place on; False, and all are forgotten, where the model cannot forget a part."""
        memory = self.library.call.llama_get_memory(self._context)
        if self.library.call.llama_memory_seq_rm(memory, 0, place, -1):
            return True
        self.clear()
        return False

    def read(self, tokens: list[int], *, every: bool) -> np.ndarray:
        """Read tokens after those read before; logits after `every` one of them, or after the last, one row each."""
        size = len(tokens)
        ids, wanted = (ctypes.c_int32 * size)(*tokens), (ctypes.c_int8 * size)(*[every] * (size - 1), 1)
        batch = _Batch(n_tokens=size, token=ctypes.addressof(ids), logits=ctypes.addressof(wanted))
        if code := self.library.call.llama_decode(self._context, batch):
            raise ProcessFailed(f"llama.cpp stopped with code {code} while reading {size} tokens: {self.library.why()}")
        found = ctypes.cast(self.library.call.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
        # Copied: the memory is the library's own, which the next batch overwrites.
        return np.ctypeslib.as_array(found, shape=(size if every else 1, self.vocabulary)).copy()

    def read_rows(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """Read tokens of several sequences together; the logits that each row wants, `(wanted, vocabulary)`.

        Raises ProcessFailed where the cache has no room left for them.
        """
        queue = [
            (token, row.place + i, row.sequence, i >= len(row.tokens) - row.wanted)
            for row in rows
            for i, token in enumerate(row.tokens)
        ]
        found = [self._read_batch(queue[at : at + self.batch]) for at in range(0, len(queue), self.batch)]
        logits = np.concatenate(found)
        ends = np.cumsum([row.wanted for row in rows])
        return np.split(logits, ends[:-1])

    def _read_batch(self, queue: list[tuple[int, int, int, bool]]) -> np.ndarray:
        size = len(queue)
        ids, places, sequences = ((ctypes.c_int32 * size)(*(item[i] for item in queue)) for i in range(3))
        wanted, ones = (ctypes.c_int8 * size)(*(item[3] for item in queue)), (ctypes.c_int32 * size)(*[1] * size)
        begin, width = ctypes.addressof(sequences), ctypes.sizeof(ctypes.c_int32)
        of_token = (ctypes.c_void_p * size)(*(begin + width * i for i in range(size)))
        named = {"token": ids, "pos": places, "n_seq_id": ones, "seq_id": of_token, "logits": wanted}
        batch = _Batch(n_tokens=size, **{name: ctypes.addressof(held) for name, held in named.items()})
        if code := self.library.call.llama_decode(self._context, batch):
            raise ProcessFailed(f"llama.cpp stopped with code {code} while reading {size} tokens: {self.library.why()}")
        if not (count := sum(item[3] for item in queue)):
            return np.empty((0, self.vocabulary), np.float32)
        logits = ctypes.cast(self.library.call.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(logits, shape=(count, self.vocabulary)).copy()

    def forget(self, sequence: int, place: int) -> None:
        """Forget a sequence's tokens from this place on."""
        memory = self.library.call.llama_get_memory(self._context)
        self.library.call.llama_memory_seq_rm(memory, sequence, place, -1)

    def share(self, source: int, target: int, place: int) -> None:
        """Let the target begin as the source does, up to this place; the cells are shared, not copied."""
        memory = self.library.call.llama_get_memory(self._context)
        self.library.call.llama_memory_seq_cp(memory, source, target, 0, place)

    def token_ids(self, text: str) -> list[int]:
        """Tokens of a text as llama.cpp cuts it by what the file says, without a beginning of its own."""
        given = text.encode()
        ids = (ctypes.c_int32 * (len(given) + 1))()
        count = self.library.call.llama_tokenize(self._vocab, given, len(given), ids, len(ids), False, True)
        return list(ids[: max(count, 0)])

    def close(self) -> None:
        """Let go of weights and cache."""
        self._release()


def _flag_of_one_cache(parameters: _ContextParameters, library: Library) -> int:
    """Where the parameter `kv_unified` stands: behind the flags whose defaults are known."""
    if (at := bytes(parameters.rest).find(FLAGS)) < 0:
        raise Unavailable(f"{library.build.shown} lays its parameters out in another way: it is used for one sequence")
    return at + len(FLAGS) - 1


def _free(held: list[tuple[Callable, int]]) -> None:
    for free, pointer in reversed(held):
        free(pointer)


# --- the quantiser ---------------------------------------------------------------------------------------------------

FILE_TYPES = {"q2_k": 10, "q3_k_m": 12, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}  # of llama.cpp's llama_ftype


def quantise(library: Library, source: Path, target: Path, mixture: str, columns: dict[str, np.ndarray]) -> None:
    """Write a file of 16-bit floats again in a mixture; `columns` are the importances by tensor, float32.

    Raises ProcessFailed with llama.cpp's code and words.
    """
    call = library.call
    parameters = call.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[mixture]
    rows = (_ColumnImportance * (len(columns) + 1))()  # the last one, nameless, ends the list
    for row, (name, values) in zip(rows, columns.items(), strict=False):
        row.name, row.size, row.data = name.encode(), values.size, values.ctypes.data
    if columns:
        parameters.imatrix = ctypes.addressof(rows)
    library.errors.clear()
    code = call.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    if code:
        raise ProcessFailed(
            f"llama.cpp stopped with code {code} while quantising {source.name} to {mixture}: {library.why()}"
        )
