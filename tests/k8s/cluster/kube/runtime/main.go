// A container runtime for tests: to a kubelet it is what containerd is (CRI v1), but a container is a process of this machine in its own
// network, mount, PID, IPC and UTS namespaces. Its root is this machine's root, read-only, with the files of the image above.
// No cgroups (limits are not enforced) and no seccomp profile.
package main

import (
	"context"
	_ "embed"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"

	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming"
)

//go:embed enter
var enterScript []byte

type service struct {
	cri.UnimplementedRuntimeServiceServer
	cri.UnimplementedImageServiceServer
	images, folder, enter string
	node                  netip.Addr // Source of what the node itself sends to pods: probes
	streams               streaming.Server

	mutex      sync.Mutex
	next       netip.Addr // Address of the next pod; addresses are not used twice
	number     int        // Of the last pod or container
	pods       map[string]*pod
	containers map[string]*container
}

// What a Dockerfile says of an image, in IMAGES/NAME/config.json; its files lie in IMAGES/NAME/root.
type image struct {
	Entrypoint, Env []string
	User            int64
}

func main() {
	socket := flag.String("socket", "", "where to listen")
	images := flag.String("images", "", "folder with a folder for each image")
	folder := flag.String("folder", "", "folder for the containers")
	node := flag.String("node", "", "address of the node")
	first := flag.String("first-pod", "", "address of the first pod")
	flag.Parse()
	s := &service{images: *images, folder: *folder, enter: *folder + "/enter", node: netip.MustParseAddr(*node),
		next: netip.MustParseAddr(*first), pods: map[string]*pod{}, containers: map[string]*container{}}
	if err := s.serve(*socket); err != nil {
		log.Fatal(err)
	}
}

func (s *service) serve(socket string) error {
	if err := os.MkdirAll(s.folder, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(s.enter, enterScript, 0o755); err != nil {
		return err
	}
	config := streaming.DefaultConfig
	config.Addr = netip.AddrPortFrom(s.node, 10350).String()
	var err error
	if s.streams, err = streaming.NewServer(config, streamer{s}); err != nil {
		return err
	}
	go func() { log.Fatal(s.streams.Start(true)) }()

	listener, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	cri.RegisterRuntimeServiceServer(server, s)
	cri.RegisterImageServiceServer(server, s)
	return server.Serve(listener)
}

// newName must be called with the mutex held.
func (s *service) newName(kind string) string {
	s.number++
	return fmt.Sprintf("%s-%s-%d", kind, filepath.Base(s.folder), s.number)
}

func (s *service) Version(context.Context, *cri.VersionRequest) (*cri.VersionResponse, error) {
	return &cri.VersionResponse{Version: "0.1.0", RuntimeName: "processes", RuntimeVersion: "0.1.0", RuntimeApiVersion: "v1"}, nil
}

func (s *service) Status(context.Context, *cri.StatusRequest) (*cri.StatusResponse, error) {
	return &cri.StatusResponse{Status: &cri.RuntimeStatus{Conditions: []*cri.RuntimeCondition{
		{Type: cri.RuntimeReady, Status: true}, {Type: cri.NetworkReady, Status: true}}}}, nil
}

func (s *service) UpdateRuntimeConfig(context.Context, *cri.UpdateRuntimeConfigRequest) (*cri.UpdateRuntimeConfigResponse, error) {
	return &cri.UpdateRuntimeConfigResponse{}, nil
}

// --- Images -------------------------------------------------------------------------------------------------------------------------

func (s *service) image(name string) (*image, error) {
	text, err := os.ReadFile(filepath.Join(s.images, name, "config.json"))
	if err != nil {
		return nil, fmt.Errorf("no image %q among those that the script made: %w", name, err)
	}
	found := &image{}
	return found, json.Unmarshal(text, found)
}

func (s *service) describe(name string) *cri.Image {
	found, err := s.image(name)
	if err != nil {
		return nil
	}
	return &cri.Image{Id: name, RepoTags: []string{name}, Size: 1, Uid: &cri.Int64Value{Value: found.User}}
}

func (s *service) ImageStatus(_ context.Context, r *cri.ImageStatusRequest) (*cri.ImageStatusResponse, error) {
	return &cri.ImageStatusResponse{Image: s.describe(r.Image.Image)}, nil
}

func (s *service) PullImage(_ context.Context, r *cri.PullImageRequest) (*cri.PullImageResponse, error) {
	_, err := s.image(r.Image.Image)
	return &cri.PullImageResponse{ImageRef: r.Image.Image}, err
}

func (s *service) ListImages(context.Context, *cri.ListImagesRequest) (*cri.ListImagesResponse, error) {
	response := &cri.ListImagesResponse{}
	paths, err := filepath.Glob(s.images + "/*/*/config.json")
	for _, path := range paths {
		name, _ := filepath.Rel(s.images, filepath.Dir(path))
		response.Images = append(response.Images, s.describe(name))
	}
	return response, err
}

func (s *service) ImageFsInfo(context.Context, *cri.ImageFsInfoRequest) (*cri.ImageFsInfoResponse, error) {
	return &cri.ImageFsInfoResponse{}, nil
}
