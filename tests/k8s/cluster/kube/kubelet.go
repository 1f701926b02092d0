package main

import (
	"context"
	"time"

	cadvisorapi "github.com/google/cadvisor/info/v1"
	"github.com/spf13/cobra"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/kubernetes/cmd/kubelet/app"
	"k8s.io/kubernetes/cmd/kubelet/app/options"
	kubeletconfig "k8s.io/kubernetes/pkg/kubelet/apis/config"
	cadvisortest "k8s.io/kubernetes/pkg/kubelet/cadvisor/testing"
	"k8s.io/kubernetes/pkg/kubelet/cm"
	"k8s.io/kubernetes/pkg/util/oom"
)

// A node's size is what its flags say and not what the machine has: the scheduler counts with it, nothing enforces it.
type nodeOptions struct {
	name, address, dns, kubeconfig, runtime, folder string
	cores, gpus, memoryGiB                          int
	port                                            int32
}

type madeUpMachine struct {
	cadvisortest.Fake
	info cadvisorapi.MachineInfo
}

func (m *madeUpMachine) MachineInfo() (*cadvisorapi.MachineInfo, error) { return &m.info, nil }

// The kubelet with its own pod workers, probes, volumes and lifecycle; replaced are only the parts that touch what a machine has once:
// cgroups (cm's stub, which also invents the GPUs), cadvisor and the OOM score.
func newNodeCommand() *cobra.Command {
	var o nodeOptions
	command := &cobra.Command{
		Use:          "node",
		SilenceUsage: true,
		RunE:         func(command *cobra.Command, _ []string) error { return runNode(command.Context(), o) },
	}
	flags := command.Flags()
	flags.StringVar(&o.name, "name", "", "name of the node")
	flags.StringVar(&o.address, "address", "", "address of the node; its kubelet listens there")
	flags.Int32Var(&o.port, "port", 10250, "port of the kubelet")
	flags.StringVar(&o.dns, "dns", "", "address of the cluster's DNS server")
	flags.StringVar(&o.kubeconfig, "kubeconfig", "", "how to reach the API server")
	flags.StringVar(&o.runtime, "runtime", "", "address of the container runtime: unix:///...")
	flags.StringVar(&o.folder, "folder", "", "where the kubelet keeps its files")
	flags.IntVar(&o.cores, "cores", 8, "cores of the node")
	flags.IntVar(&o.memoryGiB, "memory-gib", 32, "memory of the node")
	flags.IntVar(&o.gpus, "gpus", 0, "nvidia.com/gpu of the node")
	return command
}

func runNode(ctx context.Context, o nodeOptions) error {
	server, err := options.NewKubeletServer()
	if err != nil {
		return err
	}
	server.KubeConfig = o.kubeconfig
	server.RootDirectory = o.folder
	server.CertDirectory = o.folder + "/pki"
	server.HostnameOverride = o.name
	server.NodeIP = o.address
	if o.gpus > 0 {
		server.RegisterWithTaints = []v1.Taint{{Key: "nvidia.com/gpu", Value: "present", Effect: v1.TaintEffectNoSchedule}}
	}
	configure(&server.KubeletConfiguration, o)

	parts, err := app.UnsecuredDependencies(ctx, server, utilfeature.DefaultFeatureGate)
	if err != nil {
		return err
	}
	gpus := v1.ResourceList{}
	if o.gpus > 0 {
		gpus["nvidia.com/gpu"] = *resource.NewQuantity(int64(o.gpus), resource.DecimalSI)
	}
	parts.ContainerManager = cm.NewStubContainerManagerWithDevicePluginResource(gpus)
	parts.CAdvisorInterface = &madeUpMachine{info: cadvisorapi.MachineInfo{
		NumCores: o.cores, MemoryCapacity: uint64(o.memoryGiB) << 30, MachineID: o.name, SystemUUID: o.name, BootID: o.name}}
	parts.OOMAdjuster = oom.NewFakeOOMAdjuster()
	return app.Run(ctx, server, parts, utilfeature.DefaultFeatureGate)
}

func configure(c *kubeletconfig.KubeletConfiguration, o nodeOptions) {
	c.ContainerRuntimeEndpoint = o.runtime
	c.ImageServiceEndpoint = o.runtime
	c.Address = o.address
	c.Port = o.port
	c.ReadOnlyPort = 0
	c.HealthzPort = 0
	c.ClusterDomain = "cluster.local"
	c.ClusterDNS = []string{o.dns}
	c.PodLogsDir = o.folder + "/logs"
	c.StaticPodPath = ""
	c.VolumePluginDir = o.folder + "/plugins"
	c.NodeStatusUpdateFrequency.Duration = 5 * time.Second
	// The cluster's network has no way out, so its kubelets trust who reaches them.
	c.Authentication.Anonymous.Enabled = true
	c.Authentication.Webhook.Enabled = false
	c.Authorization.Mode = kubeletconfig.KubeletAuthorizationModeAlwaysAllow
	c.CgroupsPerQOS = false
	c.EnforceNodeAllocatable = nil
	c.FailSwapOn = false
	c.FailCgroupV1 = false
	c.EvictionHard = nil
	c.LocalStorageCapacityIsolation = false
	c.ImageGCHighThresholdPercent = 100 // Never
}
