// The device's streams, for nccl.cpp.
#pragma once
#include <cstdint>
#include <functional>

struct CUstream_st;

// Runs `f` after all that was put on the stream before.
void on_stream(CUstream_st *stream, std::function<void()> f);

// Copies of more bytes are not made.
uint64_t largest_copy();
