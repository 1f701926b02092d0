package main

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os/exec"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"
)

// kubectl exec and port-forward.
type streamer struct{ service *service }

func (s *service) Exec(_ context.Context, r *cri.ExecRequest) (*cri.ExecResponse, error) {
	return s.streams.GetExec(r)
}

func (s *service) PortForward(_ context.Context, r *cri.PortForwardRequest) (*cri.PortForwardResponse, error) {
	return s.streams.GetPortForward(r)
}

func (s streamer) Exec(ctx context.Context, id string, words []string, in io.Reader, out, err io.WriteCloser, tty bool,
	_ <-chan remotecommand.TerminalSize) error {
	c, failure := s.service.container(id)
	if failure != nil {
		return failure
	}
	command := c.inside(ctx, words)
	command.Stdin, command.Stdout, command.Stderr = in, out, err
	failure = command.Run()
	var exit *exec.ExitError
	if errors.As(failure, &exit) {
		return utilexec.CodeExitError{Err: failure, Code: exit.ExitCode()}
	}
	return failure
}

func (s streamer) Attach(context.Context, string, io.Reader, io.WriteCloser, io.WriteCloser, bool, <-chan remotecommand.TerminalSize) error {
	return errors.New("attach: not supported here")
}

// A port of loopback inside the pod is not reached: only what listens on the pod's address.
func (s streamer) PortForward(_ context.Context, id string, port int32, stream io.ReadWriteCloser) error {
	p, err := s.service.pod(id)
	if err != nil {
		return err
	}
	connection, err := net.Dial("tcp", netip.AddrPortFrom(p.address, uint16(port)).String())
	if err != nil {
		return err
	}
	defer connection.Close()
	go func() { _, _ = io.Copy(connection, stream); _ = connection.(*net.TCPConn).CloseWrite() }()
	_, err = io.Copy(stream, connection)
	return err
}
