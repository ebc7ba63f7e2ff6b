/* A libcuda.so.1 whose calls succeed and do nothing. Triton's own launcher (driver.c) runs on it up to
   and including its call of cuLaunchKernelEx, on a machine without a GPU. Its device is a Hopper one. */
/* driver.c looks these two up by name alone, and calls neither. */
#define cuTensorMapEncodeTiled declared_tiled
#define cuTensorMapEncodeIm2col declared_im2col
#include "cuda.h"
#undef cuTensorMapEncodeTiled
#undef cuTensorMapEncodeIm2col
#include <stdint.h>

#define API __attribute__((visibility("default"))) CUresult

static int64_t launches = 0;
static int handle;  /* what every context, module and function points to */

__attribute__((visibility("default"))) int64_t stub_launches(void) { return launches; }

API cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **params, void **extra) {
  ++launches;
  return CUDA_SUCCESS;
}
API cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  default: *value = 1024;
  }
  return CUDA_SUCCESS;
}
API cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction f) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
API cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)&handle; return CUDA_SUCCESS; }
API cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)&handle;
  return CUDA_SUCCESS;
}
API cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)&handle;
  return CUDA_SUCCESS;
}
API cuModuleGetFunction(CUfunction *f, CUmodule module, const char *name) {
  *f = (CUfunction)&handle;
  return CUDA_SUCCESS;
}
API cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}
API cuOccupancyMaxActiveClusters(int *count, CUfunction f, const CUlaunchConfig *config) {
  *count = 1;
  return CUDA_SUCCESS;
}
API cuDeviceGet(CUdevice *device, int index) { *device = index; return CUDA_SUCCESS; }
API cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
API cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
API cuGetErrorString(CUresult error, const char **text) { *text = "stub"; return CUDA_SUCCESS; }
API cuInit(unsigned int flags) { return CUDA_SUCCESS; }
API cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
API cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
API cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int value) { return CUDA_SUCCESS; }
API cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }
API cuTensorMapEncodeTiled(void) { return CUDA_SUCCESS; }
API cuTensorMapEncodeIm2col(void) { return CUDA_SUCCESS; }
