package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A pod is a network namespace: a cable (veth) to the node, one address, all routes through the node.
type pod struct {
	id      string
	config  *cri.PodSandboxConfig
	address netip.Addr
	cable   string
	created time.Time
	state   cri.PodSandboxState
}

const gateway = "169.254.1.1" // The node, seen from each pod

func (p *pod) resolvConf(s *service) string { return s.folder + "/" + p.id + ".resolv.conf" }

func ip(arguments string) error {
	if out, err := exec.Command("ip", strings.Fields(arguments)...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w: %s", arguments, err, out)
	}
	return nil
}

func (p *pod) connect(node netip.Addr) error {
	for _, arguments := range []string{
		"netns add " + p.id,
		fmt.Sprintf("link add %s type veth peer name eth0 netns %s", p.cable, p.id),
		fmt.Sprintf("address add %s/32 dev %s", gateway, p.cable),
		"link set " + p.cable + " up",
		fmt.Sprintf("route add %s/32 dev %s src %s", p.address, p.cable, node),
		"-n " + p.id + " link set lo up",
		fmt.Sprintf("-n %s address add %s/32 dev eth0", p.id, p.address),
		"-n " + p.id + " link set eth0 up",
		fmt.Sprintf("-n %s route add %s dev eth0", p.id, gateway),
		fmt.Sprintf("-n %s route add default via %s", p.id, gateway),
	} {
		if err := ip(arguments); err != nil {
			return err
		}
	}
	return nil
}

func (s *service) RunPodSandbox(_ context.Context, r *cri.RunPodSandboxRequest) (*cri.RunPodSandboxResponse, error) {
	s.mutex.Lock()
	p := &pod{id: s.newName("pod"), config: r.Config, address: s.next, created: time.Now()}
	s.next = s.next.Next()
	s.mutex.Unlock()
	p.cable = fmt.Sprintf("v%x", p.address.As4())
	if err := p.connect(s.node); err != nil {
		return nil, err
	}
	dns := r.Config.GetDnsConfig()
	text := fmt.Sprintf("nameserver %s\nsearch %s\noptions %s\n", strings.Join(dns.GetServers(), "\nnameserver "),
		strings.Join(dns.GetSearches(), " "), strings.Join(dns.GetOptions(), " "))
	if err := os.WriteFile(p.resolvConf(s), []byte(text), 0o644); err != nil {
		return nil, err
	}
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.pods[p.id] = p
	return &cri.RunPodSandboxResponse{PodSandboxId: p.id}, nil
}

func (s *service) pod(id string) (*pod, error) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if p := s.pods[id]; p != nil {
		return p, nil
	}
	return nil, fmt.Errorf("no pod sandbox %q", id)
}

func (s *service) StopPodSandbox(ctx context.Context, r *cri.StopPodSandboxRequest) (*cri.StopPodSandboxResponse, error) {
	p, err := s.pod(r.PodSandboxId)
	if err != nil {
		return &cri.StopPodSandboxResponse{}, nil // Gone already
	}
	for _, c := range s.containersOf(p.id) {
		c.stop(0)
	}
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if p.state == cri.PodSandboxState_SANDBOX_NOTREADY {
		return &cri.StopPodSandboxResponse{}, nil
	}
	p.state = cri.PodSandboxState_SANDBOX_NOTREADY
	_ = ip("link delete " + p.cable)
	return &cri.StopPodSandboxResponse{}, ip("netns delete " + p.id)
}

func (s *service) RemovePodSandbox(ctx context.Context, r *cri.RemovePodSandboxRequest) (*cri.RemovePodSandboxResponse, error) {
	if _, err := s.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: r.PodSandboxId}); err != nil {
		return nil, err
	}
	for _, c := range s.containersOf(r.PodSandboxId) {
		s.remove(c)
	}
	s.mutex.Lock()
	defer s.mutex.Unlock()
	delete(s.pods, r.PodSandboxId)
	return &cri.RemovePodSandboxResponse{}, nil
}

func (s *service) PodSandboxStatus(_ context.Context, r *cri.PodSandboxStatusRequest) (*cri.PodSandboxStatusResponse, error) {
	p, err := s.pod(r.PodSandboxId)
	if err != nil {
		return nil, err
	}
	return &cri.PodSandboxStatusResponse{Status: &cri.PodSandboxStatus{Id: p.id, Metadata: p.config.Metadata, State: p.state,
		CreatedAt: p.created.UnixNano(), Network: &cri.PodSandboxNetworkStatus{Ip: p.address.String()}, Labels: p.config.Labels,
		Annotations: p.config.Annotations, Linux: &cri.LinuxPodSandboxStatus{Namespaces: &cri.Namespace{Options: &cri.NamespaceOption{}}}}}, nil
}

func (s *service) ListPodSandbox(_ context.Context, r *cri.ListPodSandboxRequest) (*cri.ListPodSandboxResponse, error) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	response := &cri.ListPodSandboxResponse{}
	for _, p := range s.pods {
		filter := r.GetFilter()
		if (filter.GetId() != "" && filter.GetId() != p.id) || (filter.GetState() != nil && filter.State.State != p.state) ||
			!selects(filter.GetLabelSelector(), p.config.Labels) {
			continue
		}
		response.Items = append(response.Items, &cri.PodSandbox{Id: p.id, Metadata: p.config.Metadata, State: p.state,
			CreatedAt: p.created.UnixNano(), Labels: p.config.Labels, Annotations: p.config.Annotations})
	}
	return response, nil
}

func selects(selector, labels map[string]string) bool {
	for key, value := range selector {
		if labels[key] != value {
			return false
		}
	}
	return true
}
