// What every fuzz target gives: a function that must survive any bytes, and inputs to start from.
// The same target runs under libFuzzer (./dev fuzz) and, without clang, under driver_main.cc
// (./dev test).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "services/checkpoint/file.h"

// Returns 0; anything it must not do ends the process.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace sluice::fuzz {

// Defined by each target: whole, sound inputs that mutations start from.
std::vector<std::string> Seeds();

// The input as an open file that lies in memory.
std::unique_ptr<checkpoint::File> FileOf(const uint8_t* data, size_t size, const std::string& name);

// A folder in memory where there is one (/dev/shm); removed when the process ends in good order.
const std::string& Folder();
// Writes or replaces a file of Folder().
void WriteFile(const std::string& name, const uint8_t* data, size_t size);
void WriteFile(const std::string& name, const std::string& content);

// Content of tests/testdata/NAME. Ends the process when it is not there.
std::string Testdata(const std::string& name);

// Opens the model `path` and reads every tensor and small file of it: what a reader accepts must
// also be readable to the end.
void OpenAndRead(const std::string& path);

}  // namespace sluice::fuzz
