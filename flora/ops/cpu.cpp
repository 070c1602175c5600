// The operator's own work around W0's product on a CPU: scale, sum, add, modulate.
//
// Threads are torch's, through its stable ABI. Shapes as in `ops/__init__.py`; T counts the copies of all
// rows. This is the only file that is compiled, with all that it includes.

#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include "kernels/modulation.h"
#include "kernels/program.h"
#include "kernels/rows.h"

#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <type_traits>

namespace {

template <typename T>
T argument(PyObject* number) {
  if constexpr (std::is_pointer_v<T>) return static_cast<T>(PyLong_AsVoidPtr(number));
  else return PyLong_AsLongLong(number);
}

// A Python function of integers: addresses and counts. torch's own operators take several times as
// long to call, and a step of decoding has hundreds of layers.
template <typename... Args>
PyObject* call(void (*kernel)(const Job&, Args...), PyObject* const* args, Py_ssize_t count) {
  if (count != 1 + sizeof...(Args)) {
    PyErr_SetString(PyExc_TypeError, "a job and its kernel's arguments are expected");
    return nullptr;
  }
  size_t at = 0;
  const auto* job = static_cast<const Job*>(PyLong_AsVoidPtr(args[at++]));
  std::tuple<Args...> values{argument<Args>(args[at++])...};
  if (PyErr_Occurred()) return nullptr;
  PyThreadState* state = PyEval_SaveThread();
  std::string error;
  try {
    std::apply([&](Args... value) { kernel(*job, value...); }, values);
  } catch (const std::exception& found) {
    error = found.what();
  }
  PyEval_RestoreThread(state);
  if (!error.empty()) {
    PyErr_SetString(PyExc_RuntimeError, error.c_str());
    return nullptr;
  }
  Py_RETURN_NONE;
}

template <auto kernel>
PyObject* method(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return call(kernel, args, count);
}

template <auto kernel>
PyMethodDef entry(const char* name, const char* doc) {
  // Through a function of no arguments, as C's API has one type for all calling conventions.
  const auto function = reinterpret_cast<void (*)()>(&method<kernel>);
  return {name, reinterpret_cast<PyCFunction>(function), METH_FASTCALL, doc};
}

PyMethodDef methods[] = {
    entry<&expand>("expand", "expand(job, x, to)"),
    entry<&contract>("contract", "contract(job, product, x, bias, to)"),
    entry<&multiply_modulated>(
        "multiply_modulated",
        "multiply_modulated(job, first_page, pages, weight, x, count, to, stride)"),
    entry<&multiply_back>("multiply_back",
                          "multiply_back(job, first_page, pages, weight, dy, count, dx)"),
    entry<&modulation_gradients>(
        "modulation_gradients",
        "modulation_gradients(job, first_page, pages, weight, dy, x, count, din, dout)"),
    entry<&scale_gradients>("scale_gradients", "scale_gradients(job, of_out, dy, v, dv, sums)"),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "cpu", nullptr, 0, methods};

STABLE_TORCH_LIBRARY_FRAGMENT(flora, library) {
  library.def("cpu_linear(Tensor x, Tensor? bias, Tensor layer, int out_features) -> Tensor");
  library.def("run_program(int layer, int step, Tensor x) -> Tensor");
  library.def("make_product(str name, bool packed, Tensor weight) -> int");
  library.def("drop_product(int product) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(flora, CompositeExplicitAutograd, library) {
  library.impl("cpu_linear", TORCH_BOX(&linear));
  library.impl("run_program", TORCH_BOX(&run_program));
  library.impl("make_product", TORCH_BOX(&make_product));
  library.impl("drop_product", TORCH_BOX(&drop_product));
}

}  // namespace

#define INIT_(name) PyInit_##name
#define INIT(name) INIT_(name)

PyMODINIT_FUNC INIT(TORCH_EXTENSION_NAME)() { return PyModule_Create(&definition); }
