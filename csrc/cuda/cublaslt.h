// cuBLASLt as far as linear_cublaslt.cpp calls it: its functions, and its numbers by their names in
// cublasLt.h, cublas_api.h and library_types.h without the prefix. They are declared here since
// neither nvcc nor torch brings these headers; a test compares them with NVIDIA's.
//
// Nothing is linked. torch has the library loaded for itself, and that copy is asked for by name.
#pragma once

#include <cstddef>
#include <cstdint>

namespace deit::cublaslt {

using Status = int;
constexpr Status kSuccess = 0;

constexpr int kOpT = 1;                                        // CUBLAS_OP_T
constexpr int kCompute32F = 68;                                // CUBLAS_COMPUTE_32F
constexpr int kReal32F = 0, kReal16F = 2, kReal16BF = 14;      // CUDA_R_...
constexpr int kDescTransA = 3, kDescEpilogue = 7, kDescBiasPointer = 8;
constexpr uint32_t kEpilogueDefault = 1, kEpilogueBias = 4, kEpilogueGelu = 32;
constexpr int kPrefMaxWorkspaceBytes = 1, kPrefReductionSchemeMask = 3;
constexpr int kPrefMinAlignmentBytes = 5;                      // of A; of B, C and D the next ones
constexpr uint32_t kReductionComputeType = 2;

struct Algo {
  uint64_t data[8];
};
struct Heuristic {
  Algo algo;
  size_t workspace_size;
  Status state;
  float waves_count;
  int reserved[4];
};

struct Context;
struct MatmulDesc;
struct MatrixLayout;
struct Preference;

struct Api {
  const char* (*GetStatusName)(Status);
  Status (*Create)(Context**);
  Status (*MatmulDescCreate)(MatmulDesc**, int compute_type, int scale_type);
  Status (*MatmulDescDestroy)(MatmulDesc*);
  Status (*MatmulDescSetAttribute)(MatmulDesc*, int attribute, const void* value, size_t bytes);
  Status (*MatrixLayoutCreate)(MatrixLayout**, int type, uint64_t rows, uint64_t columns,
                               int64_t leading);
  Status (*MatrixLayoutDestroy)(MatrixLayout*);
  Status (*MatmulPreferenceCreate)(Preference**);
  Status (*MatmulPreferenceDestroy)(Preference*);
  Status (*MatmulPreferenceSetAttribute)(Preference*, int attribute, const void* value,
                                         size_t bytes);
  Status (*MatmulAlgoGetHeuristic)(Context*, MatmulDesc*, MatrixLayout* a, MatrixLayout* b,
                                   MatrixLayout* c, MatrixLayout* d, Preference*, int wanted,
                                   Heuristic* found, int* count);
  Status (*Matmul)(Context*, MatmulDesc*, const void* alpha, const void* a, MatrixLayout*,
                   const void* b, MatrixLayout*, const void* beta, const void* c, MatrixLayout*,
                   void* d, MatrixLayout*, const Algo*, void* workspace, size_t workspace_bytes,
                   void* stream);
};

// The library's functions; null where it is not to be had, and `why_not` then says why.
const Api* find(const char** why_not);

}  // namespace deit::cublaslt
