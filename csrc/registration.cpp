// The extension module attnvariants._C: what it was built with.
//
// Operator schemas are defined in Python (attnvariants/ops), so that they exist without this
// extension. Importing it makes its implementations known and lets `python -m attnvariants` say
// what was built. Only the limited CPython API and torch's stable ABI are used, so that one binary
// serves every later Python and torch.

#include <Python.h>

#ifdef USE_CUDA
#include <cuda_runtime_api.h>
#else
#define CUDART_VERSION 0
#endif

#ifndef TORCH_TARGET_VERSION
#define TORCH_TARGET_VERSION 0
#endif

namespace {

PyObject* build_info(PyObject*, PyObject*) {
  const unsigned long long torch_target = TORCH_TARGET_VERSION;
  return Py_BuildValue(
      "{s:i,s:i,s:i}",
      "cuda", CUDART_VERSION,  // 13000 for CUDA 13.0, 0 without CUDA
      "torch_major", static_cast<int>(torch_target >> 56),
      "torch_minor", static_cast<int>((torch_target >> 48) & 0xff));
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS,
     "Returns the CUDA version and the oldest torch version that this extension was built for."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "Compiled part of attnvariants.", -1,
                          methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&definition); }
