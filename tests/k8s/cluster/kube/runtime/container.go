package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

type container struct {
	id, folder, logPath string
	pod                 *pod
	config              *cri.ContainerConfig
	image               *image
	created             time.Time
	command             *exec.Cmd
	done                chan struct{} // Closed when the process has ended

	mutex             sync.Mutex
	started, finished time.Time
	exitCode          int32
}

func (c *container) user() (uid, gid int64) {
	security := c.config.GetLinux().GetSecurityContext()
	uid = c.image.User
	if security.GetRunAsUser() != nil {
		uid = security.RunAsUser.Value
	}
	gid = uid
	if security.GetRunAsGroup() != nil {
		gid = security.RunAsGroup.Value
	}
	return uid, gid
}

func (c *container) environment() []string {
	environment := append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/",
		"HOSTNAME=" + c.pod.config.Hostname}, c.image.Env...)
	for _, variable := range c.config.Envs {
		environment = append(environment, variable.Key+"="+string(variable.Value))
	}
	return environment
}

func (s *service) CreateContainer(_ context.Context, r *cri.CreateContainerRequest) (*cri.CreateContainerResponse, error) {
	p, err := s.pod(r.PodSandboxId)
	if err != nil {
		return nil, err
	}
	found, err := s.image(r.Config.Image.Image)
	if err != nil {
		return nil, err
	}
	if directory := r.Config.WorkingDir; directory != "" && directory != "/" {
		return nil, fmt.Errorf("workingDir %q: not supported here", directory)
	}
	s.mutex.Lock()
	c := &container{id: s.newName("container"), pod: p, config: r.Config, image: found, created: time.Now(), done: make(chan struct{})}
	s.mutex.Unlock()
	c.folder = filepath.Join(s.folder, c.id)
	c.logPath = filepath.Join(r.SandboxConfig.LogDirectory, r.Config.LogPath)
	if err := c.prepare(s); err != nil {
		return nil, err
	}
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.containers[c.id] = c
	return &cri.CreateContainerResponse{ContainerId: c.id}, nil
}

func (c *container) prepare(s *service) error {
	if err := os.MkdirAll(c.folder, 0o755); err != nil {
		return err
	}
	table := fmt.Sprintf("%s\t/etc/resolv.conf\tro\n", c.pod.resolvConf(s))
	for _, mount := range c.config.Mounts {
		mode := "rw"
		if mount.Readonly {
			mode = "ro"
		}
		table += fmt.Sprintf("%s\t%s\t%s\n", mount.HostPath, mount.ContainerPath, mode)
	}
	if err := os.WriteFile(c.folder+"/mounts", []byte(table), 0o644); err != nil {
		return err
	}
	words := c.config.Command
	if len(words) == 0 {
		words = c.image.Entrypoint
	}
	writable := "rw"
	if c.config.GetLinux().GetSecurityContext().GetReadonlyRootfs() {
		writable = "ro"
	}
	uid, gid := c.user()
	arguments := append([]string{"netns", "exec", c.pod.id, s.enter, c.folder, filepath.Join(s.images, c.config.Image.Image, "root"),
		writable, c.pod.config.Hostname, strconv.FormatInt(uid, 10), strconv.FormatInt(gid, 10)}, words...)
	c.command = exec.Command("ip", append(arguments, c.config.Args...)...)
	c.command.Env = c.environment()
	c.command.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS}
	return nil
}

func (s *service) StartContainer(_ context.Context, r *cri.StartContainerRequest) (*cri.StartContainerResponse, error) {
	c, err := s.container(r.ContainerId)
	if err != nil {
		return nil, err
	}
	log, err := os.OpenFile(c.logPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	stdout, err := c.command.StdoutPipe()
	if err != nil {
		return nil, err
	}
	stderr, err := c.command.StderrPipe()
	if err != nil {
		return nil, err
	}
	c.mutex.Lock()
	defer c.mutex.Unlock()
	if err := c.command.Start(); err != nil {
		return nil, err
	}
	c.started = time.Now()
	go c.follow(log, stdout, stderr)
	return &cri.StartContainerResponse{}, nil
}

// follow keeps the log as a kubelet wants it, and notes the end.
func (c *container) follow(log *os.File, stdout, stderr io.Reader) {
	var both sync.WaitGroup
	copyLines := func(name string, from io.Reader) {
		defer both.Done()
		lines := bufio.NewScanner(from)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			fmt.Fprintf(log, "%s %s F %s\n", time.Now().UTC().Format(time.RFC3339Nano), name, lines.Bytes())
		}
	}
	both.Add(2)
	go copyLines("stdout", stdout)
	go copyLines("stderr", stderr)
	both.Wait()
	_ = c.command.Wait()
	log.Close()
	c.mutex.Lock()
	c.finished = time.Now()
	c.exitCode = int32(c.command.ProcessState.ExitCode())
	if status, ok := c.command.ProcessState.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		c.exitCode = 128 + int32(status.Signal())
	}
	c.mutex.Unlock()
	close(c.done)
}

// stop is SIGTERM, a time, SIGKILL. Without a time: SIGKILL.
func (c *container) stop(grace time.Duration) {
	c.mutex.Lock()
	running := !c.started.IsZero()
	c.mutex.Unlock()
	if !running {
		return
	}
	if grace > 0 {
		_ = c.command.Process.Signal(syscall.SIGTERM)
		select {
		case <-c.done:
			return
		case <-time.After(grace):
		}
	}
	_ = c.command.Process.Kill()
	<-c.done
}

func (s *service) StopContainer(_ context.Context, r *cri.StopContainerRequest) (*cri.StopContainerResponse, error) {
	c, err := s.container(r.ContainerId)
	if err == nil {
		c.stop(time.Duration(r.Timeout) * time.Second)
	}
	return &cri.StopContainerResponse{}, nil
}

func (s *service) remove(c *container) {
	c.stop(0)
	s.mutex.Lock()
	defer s.mutex.Unlock()
	delete(s.containers, c.id)
	_ = os.RemoveAll(c.folder)
}

func (s *service) RemoveContainer(_ context.Context, r *cri.RemoveContainerRequest) (*cri.RemoveContainerResponse, error) {
	if c, err := s.container(r.ContainerId); err == nil {
		s.remove(c)
	}
	return &cri.RemoveContainerResponse{}, nil
}

func (s *service) container(id string) (*container, error) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if c := s.containers[id]; c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("no container %q", id)
}

func (s *service) containersOf(pod string) []*container {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	var found []*container
	for _, c := range s.containers {
		if c.pod.id == pod {
			found = append(found, c)
		}
	}
	return found
}

// --- What the kubelet asks ----------------------------------------------------------------------------------------------------------

// status must be called with c's mutex held.
func (c *container) status() *cri.ContainerStatus {
	nano := func(t time.Time) int64 {
		if t.IsZero() {
			return 0
		}
		return t.UnixNano()
	}
	status := &cri.ContainerStatus{Id: c.id, Metadata: c.config.Metadata, CreatedAt: nano(c.created), StartedAt: nano(c.started),
		FinishedAt: nano(c.finished), ExitCode: c.exitCode, Image: c.config.Image, ImageRef: c.config.Image.Image,
		ImageId: c.config.Image.Image, Labels: c.config.Labels, Annotations: c.config.Annotations, Mounts: c.config.Mounts, LogPath: c.logPath}
	switch {
	case !c.finished.IsZero() && c.exitCode == 0:
		status.State, status.Reason = cri.ContainerState_CONTAINER_EXITED, "Completed"
	case !c.finished.IsZero():
		status.State, status.Reason = cri.ContainerState_CONTAINER_EXITED, "Error"
	case !c.started.IsZero():
		status.State = cri.ContainerState_CONTAINER_RUNNING
	}
	return status
}

func (s *service) ContainerStatus(_ context.Context, r *cri.ContainerStatusRequest) (*cri.ContainerStatusResponse, error) {
	c, err := s.container(r.ContainerId)
	if err != nil {
		return nil, err
	}
	c.mutex.Lock()
	defer c.mutex.Unlock()
	return &cri.ContainerStatusResponse{Status: c.status()}, nil
}

func (s *service) ListContainers(_ context.Context, r *cri.ListContainersRequest) (*cri.ListContainersResponse, error) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	response := &cri.ListContainersResponse{}
	for _, c := range s.containers {
		c.mutex.Lock()
		status := c.status()
		c.mutex.Unlock()
		filter := r.GetFilter()
		if (filter.GetId() != "" && filter.GetId() != c.id) || (filter.GetState() != nil && filter.State.State != status.State) ||
			(filter.GetPodSandboxId() != "" && filter.GetPodSandboxId() != c.pod.id) ||
			!selects(filter.GetLabelSelector(), c.config.Labels) {
			continue
		}
		response.Containers = append(response.Containers, &cri.Container{Id: c.id, PodSandboxId: c.pod.id, Metadata: status.Metadata,
			Image: status.Image, ImageRef: status.ImageRef, ImageId: status.ImageId, State: status.State, CreatedAt: status.CreatedAt,
			Labels: status.Labels, Annotations: status.Annotations})
	}
	return response, nil
}

// --- Commands in a running container ------------------------------------------------------------------------------------------------

func (c *container) inside(ctx context.Context, words []string) *exec.Cmd {
	uid, gid := c.user()
	c.mutex.Lock()
	defer c.mutex.Unlock()
	command := exec.CommandContext(ctx, "nsenter", append([]string{"--target", strconv.Itoa(c.command.Process.Pid), "--mount", "--pid",
		"--net", "--ipc", "--uts", "--root", "--wd", "--", "setpriv", fmt.Sprint("--reuid=", uid), fmt.Sprint("--regid=", gid),
		"--clear-groups", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all", "--"}, words...)...)
	command.Env = c.environment()
	return command
}

func (s *service) ExecSync(ctx context.Context, r *cri.ExecSyncRequest) (*cri.ExecSyncResponse, error) {
	c, err := s.container(r.ContainerId)
	if err != nil {
		return nil, err
	}
	if r.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(r.Timeout)*time.Second)
		defer cancel()
	}
	command := c.inside(ctx, r.Cmd)
	var stdout, stderr bytes.Buffer
	command.Stdout, command.Stderr = &stdout, &stderr
	err = command.Run()
	if command.ProcessState == nil || ctx.Err() != nil {
		return nil, fmt.Errorf("%s: %v, %w", strings.Join(r.Cmd, " "), err, ctx.Err())
	}
	return &cri.ExecSyncResponse{Stdout: stdout.Bytes(), Stderr: stderr.Bytes(), ExitCode: int32(command.ProcessState.ExitCode())}, nil
}
