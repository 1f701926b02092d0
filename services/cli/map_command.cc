// sluice map: the live device map and the state of a running cluster, from its admin port.
#include <google/protobuf/util/json_util.h>
#include <grpcpp/client_context.h>

#include <cstdio>
#include <memory>

#include "absl/strings/str_cat.h"
#include "proto/sluice/v1/admin.grpc.pb.h"
#include "services/cli/answer_stream.h"
#include "services/cli/commands.h"
#include "services/cli/progress.h"
#include "services/rpc/channel.h"
#include "services/rpc/flags.h"
#include "services/rpc/grpc_status.h"

namespace sluice::cli {
namespace {

struct MapFlags {
  std::string admin = kDefaultAdminAddress;
  bool json = false;
};

void SetDeadline(grpc::ClientContext* context) {
  context->set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(5));
}

std::string ToJson(const google::protobuf::Message& message) {
  google::protobuf::util::JsonPrintOptions options;
  options.add_whitespace = true;
  options.preserve_proto_field_names = true;
  options.always_print_primitive_fields = true;
  std::string text;
  const auto status = google::protobuf::util::MessageToJsonString(message, &text, options);
  return status.ok() ? text : absl::StrCat("{}\n");
}

int Fail(const grpc::Status& status, const MapFlags& flags) {
  std::fprintf(stderr, "%s\n", ErrorLine(rpc::FromGrpcStatus(status), flags.admin).c_str());
  return 1;
}

int Map(const MapFlags& flags) {
  auto stub = v1::AdminService::NewStub(rpc::MakeChannel(flags.admin, rpc::ChannelKind::kClient));
  v1::GetClusterResponse cluster;
  grpc::ClientContext cluster_context;
  SetDeadline(&cluster_context);
  grpc::Status status = stub->GetCluster(&cluster_context, {}, &cluster);
  if (!status.ok()) {
    return Fail(status, flags);
  }
  v1::GetDeviceMapResponse map;
  grpc::ClientContext map_context;
  SetDeadline(&map_context);
  status = stub->GetDeviceMap(&map_context, {}, &map);
  if (!status.ok() && status.error_code() != grpc::StatusCode::FAILED_PRECONDITION) {
    return Fail(status, flags);
  }
  if (flags.json) {
    std::printf("{\"cluster\": %s, \"device_map\": %s}\n", ToJson(cluster).c_str(),
                status.ok() ? ToJson(map.device_map()).c_str() : "null");
    return 0;
  }
  std::printf("model %s, epoch %llu: %s\n", cluster.model().c_str(),
              static_cast<unsigned long long>(cluster.epoch()), ProgressLine(cluster, 200).c_str());
  std::printf("%s", status.ok() ? map.text().c_str() : "no device map yet\n");
  return 0;
}

}  // namespace

void AddMapCommand(CLI::App& app, int* exit_code) {
  CLI::App* command = app.add_subcommand("map", "Show the live device map of a running cluster");
  auto flags = std::make_shared<MapFlags>();
  rpc::AddFlag(*command, "admin", &flags->admin, "host:port of the admin listener");
  command->add_flag("--json", flags->json, "JSON: the cluster and its device map");
  command->callback([flags, exit_code] { *exit_code = Map(*flags); });
}

}  // namespace sluice::cli
