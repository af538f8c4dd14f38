// Compiles CUDA C++ with g++ -x c++ -include cuda_host.h and runs it on the CPU. docs/gpu_less.md.
#pragma once

#define QLORA_CUDA_HOST 1

#include "cuda_host/async_copy.h"
#include "cuda_host/async_proxy.h"
#include "cuda_host/device_functions.h"
#include "cuda_host/launch.h"
#include "cuda_host/machine.h"
#include "cuda_host/matrix.h"
#include "cuda_host/mbarrier.h"
#include "cuda_host/number_formats.h"
#include "cuda_host/qualifiers.h"
#include "cuda_host/tensor_copy.h"
#include "cuda_host/warp.h"
#include "cuda_host/warpgroup.h"
