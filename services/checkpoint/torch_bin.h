// Reading of one PyTorch file (pytorch_model.bin) as torch.save has written it since 1.6: a zip
// archive with a pickle that describes the tensors, and each storage as a member.
//
//   NAME/data.pkl    dict: tensor name -> _rebuild_tensor_v2(storage, offset, shape, strides, ...)
//   NAME/data/KEY    the elements of one storage; tensors may share it
//   NAME/byteorder   "little", when it is there
//
// Nothing of the file is executed (pickle.h). Offsets and strides count elements.
#pragma once

#include "absl/status/statusor.h"
#include "services/checkpoint/tensor_set.h"

namespace sluice::checkpoint {

// Every tensor lies in one piece inside its storage. INVALID_ARGUMENT for a broken or forbidden
// file; UNIMPLEMENTED for the format before 1.6, big-endian files and tensors that do not lie in
// one piece.
absl::StatusOr<TensorFile> ReadTorchBin(const File& file);

}  // namespace sluice::checkpoint
