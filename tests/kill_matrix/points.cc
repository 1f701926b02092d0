#include "tests/kill_matrix/points.h"

namespace sluice::kill_matrix {

const std::vector<Point>& AllPoints() {
  static const std::vector<Point> points = {
      {"controller.model_known"},
      {"controller.worker_attached", Scenario::kTraffic, 2},
      {"controller.planned"},
      {"controller.after_configure", Scenario::kTraffic, 2},
      {"controller.worker_ready", Scenario::kTraffic, 2},
      {"controller.pipeline_open"},
      {"controller.serving"},
      {"controller.after_admission", Scenario::kTraffic, 20},
      {"controller.before_step", Scenario::kTraffic, 200},
      {"controller.after_step", Scenario::kTraffic, 200},
      {"controller.token_received", Scenario::kTraffic, 200},
      {"controller.before_client_write", Scenario::kTraffic, 400},
      {"controller.before_release", Scenario::kTraffic, 10},
      {"controller.request_finished", Scenario::kTraffic, 10},
      {"controller.client_gone", Scenario::kTraffic, 3},
      {"controller.worker_lost", Scenario::kWorkerLoss},
      {"controller.recovering", Scenario::kWorkerLoss},
      {"controller.draining", Scenario::kSigterm},
      {"controller.drained", Scenario::kSigterm},
      {"loader.opened", Scenario::kReload},
      {"loader.listening", Scenario::kReload},
      {"loader.before_plan_answer", Scenario::kTraffic, 3},
      {"loader.after_plan_answer", Scenario::kTraffic, 3},
      {"loader.file_part"},
      {"loader.fetch_begun", Scenario::kTraffic, 2},
      {"loader.source_opened", Scenario::kTraffic, 2},
      {"loader.converted", Scenario::kReload, 4},
      {"loader.fetch_part", Scenario::kReload, 8},
      {"loader.before_stream_end", Scenario::kTraffic, 3},
      {"loader.ending", Scenario::kSigterm},
      {"worker.before_hello"},
      {"worker.after_hello"},
      {"worker.configure"},
      {"worker.fetch_part", Scenario::kTraffic, 8},
      {"worker.fetched"},
      {"worker.before_open"},
      {"worker.before_ready"},
      {"worker.after_ready"},
      {"worker.heartbeat", Scenario::kTraffic, 2},
      {"worker.step_received", Scenario::kTraffic, 200},
      {"worker.ring_received", Scenario::kTraffic, 200, 0},
      {"worker.before_compute", Scenario::kTraffic, 200},
      {"worker.after_compute", Scenario::kTraffic, 200},
      {"worker.after_send", Scenario::kTraffic, 200},
      {"worker.link_write", Scenario::kTraffic, 200, 0},
      {"worker.tokens_write", Scenario::kTraffic, 200, 1},
      {"worker.before_sampling", Scenario::kTraffic, 200, 1},
      {"worker.after_sampling", Scenario::kTraffic, 200, 1},
      {"worker.release", Scenario::kTraffic, 10},
      {"worker.session_closing", Scenario::kWorkerLoss},
      {"worker.weights_kept", Scenario::kWorkerLoss},
      {"worker.ending", Scenario::kSigterm},
  };
  return points;
}

std::string RoleOf(const Point& point) { return point.name.substr(0, point.name.find('.')); }

}  // namespace sluice::kill_matrix
