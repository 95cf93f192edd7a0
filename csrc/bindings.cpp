// SPDX-License-Identifier: Apache-2.0
// The table of contents of transformer_engine_batched._C.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>

#include "context.h"
#include "plan.h"
#include "problem.h"

namespace py = pybind11;

namespace teb {
namespace {

// Launches, or, if the chosen algorithm needs more workspace than given, launches nothing and returns the
// bytes that it needs. 0 says that it was launched.
size_t matmul(const Problem& problem, uintptr_t a, uintptr_t b, uintptr_t d, uintptr_t scale_inv_a,
              uintptr_t scale_inv_b, uintptr_t scale_d, uintptr_t amax_d, uintptr_t bias,
              float alpha, float beta, uintptr_t workspace, size_t workspace_bytes,
              uintptr_t stream) {
  const py::gil_scoped_release no_gil;
  const Pointers pointers{a, b, d, scale_inv_a, scale_inv_b, scale_d, amax_d, bias};
  const DeviceGuard guard(problem.device);
  Context& context = Context::current(problem.device);
  Plan& plan = context.plan(problem);
  const Algorithm& algorithm = plan.choose_algorithm(context.handle(), pointers);
  if (algorithm.workspace_bytes > workspace_bytes) {
    return algorithm.workspace_bytes;
  }
  plan.launch(context.handle(), pointers, alpha, beta, algorithm, workspace, workspace_bytes,
              reinterpret_cast<cudaStream_t>(stream));
  return 0;
}

void matmul_with(const Algorithm& algorithm, const Problem& problem, const Pointers& pointers,
                 float alpha, float beta, uintptr_t workspace, size_t workspace_bytes,
                 uintptr_t stream) {
  const py::gil_scoped_release no_gil;
  const DeviceGuard guard(problem.device);
  Context& context = Context::current(problem.device);
  context.plan(problem).launch(context.handle(), pointers, alpha, beta, algorithm, workspace,
                               workspace_bytes, reinterpret_cast<cudaStream_t>(stream));
}

std::vector<Algorithm> query_algorithms(const Problem& problem, const Pointers& pointers) {
  const py::gil_scoped_release no_gil;
  const DeviceGuard guard(problem.device);
  Context& context = Context::current(problem.device);
  return context.plan(problem).query_algorithms(context.handle(), pointers, kOfferedAlgorithms);
}

py::bytes algorithm_bytes(const Algorithm& algorithm) {
  return py::bytes(reinterpret_cast<const char*>(&algorithm.algo), sizeof(algorithm.algo));
}

void store_choice_bytes(const Problem& problem, const Alignment& alignment,
                        const std::string& bytes) {
  cublasLtMatmulAlgo_t algo;
  if (bytes.size() != sizeof(algo)) {
    throw std::invalid_argument("a stored algorithm has " + std::to_string(bytes.size()) +
                                " bytes, expected " + std::to_string(sizeof(algo)));
  }
  std::memcpy(&algo, bytes.data(), bytes.size());
  store_choice(problem, alignment, algo);
}

// TE's setting for all its GEMMs: streaming multiprocessors to leave free. Read at each call, as TE does.
int sm_margin() {
  const char* const value = std::getenv("NVTE_EXT_MARGIN_SM");
  return value == nullptr ? 0 : std::atoi(value);
}

// CUDA version that the driver supports, e.g. 13000; 0 without a driver.
int driver_version() {
  int version = 0;
  check_status(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
  return version;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Batched matrix products through cuBLASLt; see csrc/problem.h.";

  py::register_exception<NotSupported>(m, "NotSupportedError", PyExc_RuntimeError);

  py::enum_<DataType>(m, "DataType")
      .value("fp32", DataType::kFloat32)
      .value("fp16", DataType::kFloat16)
      .value("bf16", DataType::kBFloat16)
      .value("e4m3", DataType::kFloat8E4M3)
      .value("e5m2", DataType::kFloat8E5M2);
  py::enum_<ScaleMode>(m, "ScaleMode")
      .value("none", ScaleMode::kNone)
      .value("tensor", ScaleMode::kTensor)
      .value("block32", ScaleMode::kBlock32);
  py::enum_<Epilogue>(m, "Epilogue")
      .value("none", Epilogue::kNone)
      .value("bias", Epilogue::kBias)
      .value("gelu", Epilogue::kGelu)
      .value("gelu_bias", Epilogue::kGeluBias);

  py::class_<Matrix>(m, "Matrix")
      .def(py::init<DataType, int64_t, int64_t, bool, ScaleMode>(), py::kw_only(), py::arg("dtype"),
           py::arg("ld"), py::arg("batch_stride"), py::arg("transposed"), py::arg("scale_mode"));
  py::class_<Problem>(m, "Problem")
      .def(py::init<int64_t, int64_t, int64_t, int64_t, Matrix, Matrix, Matrix, Epilogue, DataType,
                    int64_t, bool, bool, bool, bool, int32_t, int32_t, int64_t>(),
           py::kw_only(), py::arg("batch"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("a"),
           py::arg("b"), py::arg("d"), py::arg("epilogue"), py::arg("bias_dtype"),
           py::arg("bias_batch_stride"), py::arg("accumulate"), py::arg("fast_accumulation"),
           py::arg("allow_tf32"), py::arg("amax_d"), py::arg("device"), py::arg("sm_count"),
           py::arg("workspace_limit"))
      .def("check", &Problem::check)
      .def("__repr__", &Problem::to_string)
      .def("__hash__", &Problem::hash)
      .def("__eq__", [](const Problem& x, const Problem& y) { return x == y; });

  py::class_<Pointers>(m, "Pointers")
      .def(py::init<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t,
                    uintptr_t>());
  py::class_<Algorithm>(m, "Algorithm")
      .def_readonly("workspace_bytes", &Algorithm::workspace_bytes)
      .def_readonly("rank", &Algorithm::rank)
      .def("to_bytes", &algorithm_bytes)
      .def("__repr__", [](const Algorithm& x) { return "Algorithm(" + describe(x) + ")"; });

  m.def("read_back_plan", [](const Problem& problem) { return Plan(problem).read_back(); });
  m.def("alignment_of", &alignment_of);
  m.def("query_algorithms", &query_algorithms);
  m.def("matmul", &matmul);
  m.def("matmul_with", &matmul_with);
  m.def("store_choice", &store_choice_bytes);
  m.def("clear_choices", &clear_choices);
  m.def("num_plans", [](int device) { return Context::current(device).num_plans(); });
  m.def("sm_margin", &sm_margin);
  m.def("driver_version", &driver_version);
  m.def("compiled_version", [] { return static_cast<size_t>(CUBLAS_VERSION); });
  m.def("loaded_version", [] { return cublasLtGetVersion(); });
}

}  // namespace teb
