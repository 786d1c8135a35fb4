"""Every private symbol of torch and triton that Kiln touches, and the versions they were checked on.

AOTInductor asks "the current GPU" questions while compiling, de-duplicates constants by address, and compiles host code for the build
machine's CPU. Here those questions are answered from a GpuTarget record, so that a machine without a GPU compiles the same code as one with
it; constants without memory stay apart; host code runs on any x86-64-v3 CPU. The seams:

  1. `torch._dynamo.device_interface.register_interface_for_device`: device properties
  2. `triton.runtime.driver.set_active`, `CudaDriver.is_active`: target architecture, shared memory, no launches
  3. `torch.cuda.get_device_properties` and three more: asked directly by Inductor
  4. `torch._inductor.codegen.common.register_backend_for_device`: a C++ wrapper that compiles kernels and never runs them; and
     `CachingAutotuner._create_compile_options`: a kernel's constant REGISTERS limits its registers;
     `torch._inductor.codegen.cuda.device_op_overrides.CUDADeviceOpOverrides.cpp_scratch`: scratch for every program of a grid
  5. `torch._inductor.graph.is_same_tensor`: constant de-duplication compares `data_ptr()`, which is 0 for every fake tensor
  6. `torch._inductor.cpp_builder._get_optimization_cflags`: -march=native; `CppKernel.decide_parallel_depth`: loops too short for threads
  7. `torch._inductor.codecache.convert_cubin_to_obj`: names the object after the cubin, so two kernels with equal code overwrite each
     other; and splits its commands at spaces
  8. `AotCodeCompiler`'s link step (see 11) and generated source: packages link to nothing of torch, and errors go to the runner
  9. `torch._inductor.cpu_vec_isa.valid_vec_isa_list`: the instruction set is given, not probed for with trial programs
 10. `_same_work_once`: memos and a list of traces that only cost time; what is generated stays the same
 11. `torch._inductor.cpp_builder.CppBuilder.build`: the objects of one graph are compiled side by side
 12. `torch._inductor.cpp_builder.CppBuilder.__init__`: paths in commands are quoted
 13. `torch._higher_order_ops.triton_kernel_wrap.ttir_to_functions`: whether a kernel's assembly writes memory; and its log, which alone
     tells that the analysis of a kernel gave up; `identify_mutated_tensors`: once for each kernel and form of arguments, not for each call
 14. `torch._inductor.ir.ExternKernel.require_strides`: what several kernels read is computed once
 15. `torch._inductor.fx_passes.post_grad.should_prefer_unfused_addmm`: a branch is added to the stream as it is, wherever it is computed
 16. `torch._inductor.codegen.cpp_wrapper_cpu.CppWrapperCpu.codegen_int_array_var`: sizes that were declared in one buffer of code are found
     by the address of a method that is gone, and so in another, where they are not

A process that has installed them is good for one target and nothing else: `kiln.exporter.compile` gives each compilation its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import os
import re
import shlex
import subprocess
import tempfile
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import sympy
import torch
import triton

from kiln.custom_ops.gpu.target import KIB, GpuTarget
from kiln.exporter.compiler import package
from kiln.exporter.compiler.host import MARCH, cuda_home
from kiln.exporter.errors import KilnError

CHECKED = {"torch": ("2.11.0",), "triton": ("3.6.0",)}


def check_versions() -> None:
    """Raises KilnError on a torch or triton that these seams were not checked on."""
    for name, version in (("torch", torch.__version__), ("triton", triton.__version__)):
        if version.split("+")[0] not in CHECKED[name]:
            raise KilnError(
                f"{name} {version} is not supported: the compiler seams were checked on {name} {', '.join(CHECKED[name])}; install that one"
            )


def fake_export(
    build: Callable[[], torch.nn.Module], inputs: Callable[[], tuple], dynamic_shapes, device: str
) -> torch.export.ExportedProgram:
    """torch.export of `build()` with parameters, buffers and inputs that have shapes and no memory."""
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv(tracked_fakes=[]), allow_non_fake_inputs=True, export=True)
    with mode, torch.device(device):
        model = build().eval().requires_grad_(False)
    with FakeTensorMode(), torch.device(device):
        args = inputs()
    with torch.no_grad(), tracing(TracingContext(mode)):  # export must trace in the mode that owns the parameters
        return torch.export.export(model, args, dynamic_shapes=dynamic_shapes, strict=False)


def install(target: GpuTarget | None) -> None:
    """Turn this process into a compiler for `target` (None: the CPU)."""
    check_versions()
    _keep_fake_constants_apart()
    _sums_stay_apart()
    _portable_host_code()
    _same_work_once()
    _sizes_declared_where_they_are_used()
    packages_for_the_runner()
    _paths_in_quotes()
    _objects_side_by_side()
    if target is not None:
        _cuda_toolchain()
        _device_interface(target)
        _triton_driver(target)
        _wrapper()
        _one_object_for_each_kernel()
        _inputs_computed_once()
        _what_kernels_write()


def _what_kernels_write() -> None:
    """The assembly in Kiln's kernels writes no memory; a kernel that cannot be analyzed is an error, for all its arguments would count as
    written and become outputs."""
    import logging

    import torch._higher_order_ops.triton_kernel_wrap as wrap

    original = wrap.ttir_to_functions

    def ttir_to_functions(module):
        functions = original(module)
        return {
            name: {
                value: [dataclasses.replace(op, is_pure=True) if op.name == "tt.elementwise_inline_asm" else op for op in ops]
                for value, ops in function.items()
            }
            for name, function in functions.items()
        }

    def refuse(record: logging.LogRecord) -> bool:
        if "identify_mutated_tensors" in record.getMessage():
            raise KilnError(f"what a kernel writes could not be analyzed: {record.exc_info and record.exc_info[1]}; this is a bug in Kiln")
        return True

    wrap.ttir_to_functions = ttir_to_functions
    wrap.log.addFilter(refuse)
    wrap.identify_mutated_tensors = _once_for_each_form(wrap.identify_mutated_tensors)


def _once_for_each_form(analyze: Callable) -> Callable:
    """`analyze` for each kernel and form of its arguments once, not for each call. As there, of a tensor only the dtype counts, a free size
    is as any other, and a number is itself."""
    from torch._inductor.ir import TensorBox

    known: dict[tuple, list[str]] = {}

    def form(value: Any) -> tuple:
        if isinstance(value, torch.Tensor | TensorBox):
            return (torch.Tensor, value.dtype)
        free = isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | sympy.Expr)
        return (sympy.Expr,) if free else (type(value), value)

    def analyzed(kernel: Any, kwargs: dict[str, Any], descriptors: dict) -> list[str]:
        if descriptors:  # made on the host, which no kernel of ours asks for
            return analyze(kernel, kwargs, descriptors)
        given, fn = kwargs, kernel
        if isinstance(kernel, triton.runtime.Autotuner):  # made anew for each call, around the kernel
            given, fn = kwargs | (kernel.configs[0].kwargs if kernel.configs else {}), kernel.fn
        key = (fn, *((name, *form(value)) for name, value in given.items()))
        if key not in known:
            known[key] = analyze(kernel, kwargs, descriptors)
        return list(known[key])

    return analyzed


def _sums_stay_apart() -> None:
    """x + a @ b as two operators: `addmm` is none of the runner's, and would round otherwise than the same sum after another matmul."""
    from torch._inductor.fx_passes import post_grad

    post_grad.should_prefer_unfused_addmm = lambda match: True


def _keep_fake_constants_apart() -> None:
    import torch._inductor.graph as graph
    from torch._subclasses.fake_tensor import FakeTensor

    original = graph.is_same_tensor

    def is_same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
        fakes = isinstance(a, FakeTensor), isinstance(b, FakeTensor)
        if not any(fakes):
            return original(a, b)
        return all(fakes) and a.untyped_storage()._cdata == b.untyped_storage()._cdata and a.storage_offset() == b.storage_offset()

    graph.is_same_tensor = is_same_tensor


def _portable_host_code() -> None:
    """Code for any x86-64-v3 CPU, without the build machine's paths in it."""
    import torch._inductor.config
    from torch._inductor import cpp_builder, cpu_vec_isa
    from torch._inductor.codegen import cpp
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    paths = {cache_dir(): "kiln", str(Path(torch.__file__).parent): "torch"}
    original = cpp_builder._get_optimization_cflags

    @functools.wraps(original)
    def portable(*args, **kwargs):
        cflags, ldflags = original(*args, **kwargs)
        cflags = [f"march={MARCH}" if flag == "march=native" else flag for flag in cflags]
        return cflags + [shlex.quote(f"ffile-prefix-map={path}={name}") for path, name in paths.items()], ldflags

    def enough_work(self, most, threads: int):  # with dynamic threads every loop, however short, would get a parallel region
        with torch._inductor.config.patch({"cpp.dynamic_threads": False}):
            return decide(self, most, threads)

    decide, cpp.CppKernel.decide_parallel_depth = cpp.CppKernel.decide_parallel_depth, enough_work
    cpp_builder._get_optimization_cflags = portable
    cpu_vec_isa.valid_vec_isa_list = functools.cache(lambda: [cpu_vec_isa.VecAVX2()])  # ten seconds of trial programs otherwise


def _same_work_once() -> None:
    """A graph repeats its layers; the compiler should not repeat its thoughts."""
    from torch._inductor.codegen import cpp, cpp_wrapper_cpu
    from torch._inductor.dtype_propagation import DtypePropagationOpsHandler
    from torch._ops import OpOverload
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx import proxy

    for name in ("stride_at", "stride_at_vec_range", "simplify_index_in_vec_range"):  # 128 results are kept otherwise
        setattr(cpp, name, functools.cache(getattr(cpp, name).__wrapped__))

    # asked for each constant of each constant
    cpp_wrapper_cpu.normalize_name = functools.cache(cpp_wrapper_cpu.normalize_name)

    class Sympy(types.ModuleType):
        simplify = staticmethod(sympy.expand)  # enough for strides, which are sums of products, and many times as fast
        __getattr__ = staticmethod(functools.partial(getattr, sympy))

    cpp.sympy = Sympy("sympy")
    triton.runtime.cache.triton_key = lambda: triton.__version__  # hashes all of triton's files for caches that are new and thrown away

    # a singleton whose tables are made anew for every operation
    DtypePropagationOpsHandler.__init__ = functools.cache(DtypePropagationOpsHandler.__init__)

    validate = FakeTensorMode._validate_cache_key

    def validate_ours_too(self, func, args, kwargs):
        if not (isinstance(func, OpOverload) and func.namespace == "kiln"):  # shapes follow from shapes alone
            validate(self, func, args, kwargs)

    FakeTensorMode._validate_cache_key = validate_ours_too

    class NoTrace:
        extract = staticmethod(lambda **_: NoTrace)
        summary = staticmethod(tuple)

    if not os.environ.get("KILN_DEBUG"):
        proxy.CapturedTraceback = NoTrace  # of every node: where in the Python source it was made
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def _sizes_declared_where_they_are_used() -> None:
    """A declaration is known by the buffer of code that holds it. Inductor knows it by id() of the buffer's bound method `writeline`, which
    lives as long as the call: the next method to lie there, of another buffer, then finds a name that its code does not declare."""
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    def codegen_int_array_var(self, int_array, writeline, known_statically=False, graph=None) -> str:
        key = (int_array, getattr(writeline, "__self__", writeline), getattr(writeline, "__name__", ""), known_statically, graph)
        if key not in self.codegen_int_array_var_cache:
            self.codegen_int_array_var_cache[key] = self._codegen_int_array_var_impl(int_array, writeline, known_statically)
        return self.codegen_int_array_var_cache[key]

    CppWrapperCpu.codegen_int_array_var = codegen_int_array_var


def _paths_in_quotes() -> None:
    """A compiler's command is one string that is split as a shell would do it: its paths are quoted, which Inductor does for a few."""
    from torch._inductor.cpp_builder import CppBuilder

    original = CppBuilder.__init__

    @functools.wraps(original)
    def quoted(self, name, sources, BuildOption, output_dir=""):
        sources = [sources] if isinstance(sources, str) else sources
        original(self, name, [shlex.quote(source) for source in sources], BuildOption, output_dir)
        self._compiler = shlex.quote(self._compiler)
        self._output = self._output.replace(self._target_file, shlex.quote(self._target_file))
        self._libraries_dirs_args = "".join(f"-L{shlex.quote(path)} " for path in BuildOption.get_libraries_dirs())

    CppBuilder.__init__ = quoted


def _objects_side_by_side() -> None:
    from torch._inductor.cpp_builder import CppBuilder

    build, pool, running = CppBuilder.build, ThreadPoolExecutor(2), list[Future]()

    @functools.wraps(build)
    def build_or_start(self) -> None:
        if self._compile_only and self._name.endswith((".wrapper", ".kernel")):  # other sources are deleted after the call
            running.append(pool.submit(build, self))
            return
        if not self._compile_only:
            for future in running:
                future.result()
            running.clear()
        build(self)

    CppBuilder.build = build_or_start


TOLD = "std::cerr << \"Error: \" << e.what() << '\\n';"  # by the generated interface, which gives its caller no text


def packages_for_the_runner() -> None:
    """Shared libraries that link to nothing of torch, see `package.link`; what goes wrong in them is told to the runner."""
    from torch._inductor.cpp_builder import CppBuilder

    build = CppBuilder.build

    @functools.wraps(build)
    def build_or_link(self) -> None:
        sources = shlex.split(self._sources_args)
        wrapper = next((Path(s).with_suffix(".cpp") for s in sources if Path(s).stem.endswith(".wrapper")), None)
        if wrapper and self._compile_only:
            text = wrapper.read_text()
            told = "kiln_model_error(e.what());"
            if TOLD not in text and told not in text:
                raise KilnError("AOTInductor's interface has changed: it does not print its errors as it did; this is a bug in Kiln")
            wrapper.write_text('extern "C" void kiln_model_error(const char*);\n' + text.replace(TOLD, told))
        if wrapper and not self._compile_only:
            package.link(sources, wrapper.read_text(), Path(self._target_file))
        else:
            build(self)

    CppBuilder.build = build_or_link


def _cuda_toolchain() -> None:
    """CUDA headers of CUDA_HOME, of the wheels or of an installed toolkit."""
    os.environ["CUDA_HOME"] = cuda_home()


def _properties(target: GpuTarget) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        name=target.name, major=target.capability[0], minor=target.capability[1], multi_processor_count=target.sm_count,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=target.max_threads_per_sm, max_threads_per_block=1024, warp_size=32,
        shared_memory_per_block=48 * KIB, shared_memory_per_block_optin=target.smem_optin,
        shared_memory_per_multiprocessor=target.smem_per_sm, L2_cache_size=target.l2, total_memory=target.memory,
        is_integrated=0, is_multi_gpu_board=0, gcnArchName="",
    )  # fmt: skip


def _device_interface(target: GpuTarget) -> None:
    from torch._dynamo import device_interface
    from torch._dynamo.device_interface import CudaInterface

    class Interface(CudaInterface):
        class Worker(CudaInterface.Worker):
            current_device = staticmethod(lambda: 0)
            get_device_properties = staticmethod(lambda device=None: _properties(target))

        current_device = staticmethod(lambda: 0)
        set_device = staticmethod(lambda device: None)
        device_count = staticmethod(lambda: 1)
        exchange_device = staticmethod(lambda device: 0)
        maybe_exchange_device = staticmethod(lambda device: 0)
        synchronize = staticmethod(lambda device=None: None)
        get_raw_stream = staticmethod(lambda device: 0)
        get_device_properties = staticmethod(lambda device=None: _properties(target))
        get_compute_capability = staticmethod(lambda device=None: target.sm)
        is_available = staticmethod(lambda: True)
        is_bf16_supported = staticmethod(lambda including_emulation=True: target.sm >= 80)
        is_triton_capable = staticmethod(lambda device=None: True)
        raise_if_triton_unavailable = staticmethod(lambda device=None: None)

    device_interface.init_device_reg()
    for device in ("cuda", "cuda:0"):
        device_interface.register_interface_for_device(device, Interface)
    torch.cuda.get_device_properties = lambda device=None: _properties(target)
    torch.cuda.get_device_capability = lambda device=None: target.capability
    torch.cuda.get_device_name = lambda device=None: target.name
    torch.cuda.current_device = lambda: 0


def cubin_resources(cubin: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes of its stack, where ptxas spills) of the one kernel in `cubin`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", f.name]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", out)
    if not match:
        raise KilnError(f"cuobjdump gave no resource usage: {out[:200]}")
    return int(match[1]), int(match[2])


def _triton_driver(target: GpuTarget) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    class Utils:
        @staticmethod
        def get_device_properties(device):
            return {
                "max_shared_mem": target.smem_optin, "max_num_regs": 65536, "multiprocessor_count": target.sm_count, "warpSize": 32,
                "sm_clock_rate": 1980000, "mem_clock_rate": 2619000, "mem_bus_width": 5120,
            }  # fmt: skip

        @staticmethod
        def load_binary(name, kernel, shared, device):
            registers, stack = cubin_resources(kernel)
            return object(), 0, registers, stack // 4, 1024  # spills are counted in words

    def no_launch(*args, **kwargs):
        raise RuntimeError("a kernel launch was attempted while compiling")

    class Driver(CudaDriver):
        def __init__(self):
            self.utils = Utils()
            self.launcher_cls = lambda src, metadata: no_launch
            self.get_device_capability = lambda device=0: target.capability
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None
            self.get_current_stream = lambda device=0: 0

        def get_current_target(self):
            return GPUTarget("cuda", target.sm, 32)

    CudaDriver.is_active = staticmethod(lambda: True)
    triton.runtime.driver.set_active(Driver())


KERNELS: list[str] = []  # names of those compiled in this process


def _wrapper() -> None:
    from torch._inductor.codegen import common
    from torch._inductor.codegen.cpp_wrapper_gpu import CppWrapperGpu
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    class Wrapper(CppWrapperGpu):
        @staticmethod
        def create(is_subgraph, subgraph_name, parent_wrapper, partition_signatures=None):
            return Wrapper()

        def generate_and_run_autotune_block(self):
            # the original runs kernels on example tensors; here their definitions are executed, compiled and recorded
            self.kernel_autotune_defs.splice("async_compile.wait(globals())\ndel async_compile\n")
            scope: dict = {}
            exec(self.kernel_autotune_defs.getvalue(), scope)
            for name, kernel in scope.items():
                if not isinstance(kernel, CachingAutotuner):
                    continue
                if not kernel.launchers:
                    kernel.precompile()
                launcher = kernel.launchers[0]
                if len(kernel.launchers) > 1:
                    configs = [str(choice.config) for choice in kernel.launchers]
                    raise KilnError(f"kernel {name} has {len(configs)} configurations and nothing to choose by: {configs}")
                kernel.save_gpu_kernel(stream="stream", launcher=launcher)
                KERNELS.append(name)

    options = CachingAutotuner._create_compile_options

    def limited(self, config, meta):
        doubles = [name for name, kind in meta["signature"].items() if kind == "fp64"]
        if doubles:  # a Python float: in a kernel's own tests it is float32
            raise KilnError(f"a kernel would take {', '.join(doubles)} as float64; make it a constant of the kernel")
        registers = meta["constants"].get("REGISTERS")
        return options(self, config, meta) | ({} if registers is None else {"maxnreg": registers})

    CachingAutotuner._create_compile_options = limited
    _scratch_for_every_program()
    common.init_backend_registration()
    old = common.device_codegens["cuda"]
    common.register_backend_for_device("cuda", old.scheduling, old.wrapper_codegen, Wrapper, old.fx_wrapper_codegen)


def _scratch_for_every_program() -> None:
    """A kernel's scratch (its tensor descriptors) is so many bytes a program; the original allocates them once for the whole grid."""
    from torch._inductor.codegen.cuda.device_op_overrides import CUDADeviceOpOverrides

    original = CUDADeviceOpOverrides.cpp_scratch

    def cpp_scratch(self, idx, workspace, prefix=None):
        lines, name = original(self, idx, workspace, prefix)
        one = f"{name}_size[] = {{{workspace.size}}};"
        if workspace.size > 0:
            if sum(one in line for line in lines) != 1:
                raise KilnError("the compiler declares a kernel's scratch in another way than expected; this is a bug in Kiln")
            whole = f"{name}_size[] = {{int64_t({workspace.size}) * grid_0 * grid_1 * grid_2}};"
            lines = [line.replace(one, whole) for line in lines]
        return lines, name

    CUDADeviceOpOverrides.cpp_scratch = cpp_scratch


def _inputs_computed_once() -> None:
    """The original copies an input that is not in memory yet, and computes it anew for each argument of each kernel.

    Only where T is free: one token's graph stays as it was measured.
    """
    from torch._inductor.ir import ExternKernel, StorageBox, TensorBox

    original = ExternKernel.require_strides.__func__

    def require_strides(cls, x, *args, **kwargs):
        free = isinstance(x, TensorBox) and any(sympy.sympify(n).free_symbols for n in x.get_size())
        if free and isinstance(x.data, StorageBox):
            x.realize()
        return original(cls, x, *args, **kwargs)

    ExternKernel.require_strides = classmethod(require_strides)


def _one_object_for_each_kernel() -> None:
    from torch._inductor import codecache

    def convert(cubin_file: str, kernel_name: str, ld: str, objcopy: str) -> str:
        folder, own = Path(cubin_file).parent, f"{kernel_name}.cubin"
        (folder / own).write_bytes(Path(cubin_file).read_bytes())
        symbol = re.sub(r"\W", "_", own)  # of the path as it is given: here a name without folders
        names = [f"--redefine-sym=_binary_{symbol}_{part}=__{kernel_name}_{part}" for part in ("start", "size", "end")]
        section = "--rename-section=.data=.rodata,alloc,load,readonly,data,contents"
        for command in ([ld, "-r", "-b", "binary", "-z", "noexecstack", "-o", f"{own}.o", own], [objcopy, section, *names, f"{own}.o"]):
            subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        return str(folder / f"{own}.o")

    codecache.convert_cubin_to_obj = convert


FUSE_ACROSS_BYTES = 4 << 20


PACKED_LINEAR = """AOTITorchError aoti_torch_cpu_packed_linear(
    AtenTensorHandle x, AtenTensorHandle words, AtenTensorHandle halves, const char* block_type, AtenTensorHandle* out)"""


def inductor_options(target: GpuTarget | None, entry: str) -> dict:
    """Options of one compilation: nothing is measured, no constant is read, no weight and no build path is packed."""
    options = {
        "aot_inductor.package": True,
        "aot_inductor.model_name_for_generated_files": entry,
        "aot_inductor.link_libtorch": False,
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.package_constants_on_disk_format": None,
        "aot_inductor.precompile_headers": False,  # used once, kept for ever
        "always_keep_tensor_constants": True,
        "joint_graph_constant_folding": False,
        "compile_threads": 1,
        "cpp.dynamic_threads": True,  # those of the machine that plays, not of this one
        "cpp.threads": 8,  # what loops are cut for
        "cpp.vec_isa_ok": True,
        "cpp.simdlen": 256,
    }
    if target is None:
        options["aot_inductor.compile_wrapper_opt_level"] = "O0"  # calls of kernels and allocations: a tenth of a millisecond in a step
        from kiln.custom_ops.weights import linear

        options["aot_inductor.custom_ops_to_c_shims"] = {linear.packed_linear._opoverload: [PACKED_LINEAR]}
    else:
        options |= {
            "cuda.arch": str(target.sm),
            "aot_inductor.embed_kernel_binary": True,
            "deterministic": True,
            "triton.autotune_pointwise": False,
            "triton.autotune_at_compile_time": True,
            "triton.multi_kernel": 0,
            "max_autotune": False, "max_autotune_gemm": False, "max_autotune_pointwise": False,
            "coordinate_descent_tuning": False,
            "benchmark_fusion": False, "benchmark_epilogue_fusion": False, "benchmark_combo_kernel": False,
            "shape_padding": False,
            "reorder_for_peak_memory": False,  # its model of memory moves the dequantization of weights away from their use
        }  # fmt: skip
        if entry == "prefill":
            # Cache writes of all layers share the positions; fused on that ground they would keep every layer's K and V alive to the end.
            options["score_fusion_memory_threshold"] = FUSE_ACROSS_BYTES
    return options


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inductor's chatter about fake tensors and missing GPUs says nothing to a user."""
    import logging
    import warnings

    level = logging.getLogger("torch").level
    logging.getLogger("torch").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch").setLevel(level)
