// The cluster's DNS server: names of Services and of the pods behind headless ones, as Kubernetes' DNS specification says, A records only.
//
//	sluice.sluice.svc.cluster.local                            the Service's address
//	sluice-workers.sluice.svc.cluster.local                    headless: an address for each ready pod (or all, publishNotReadyAddresses)
//	sluice-worker-0.sluice-workers.sluice.svc.cluster.local    that pod
package main

import (
	"flag"
	"log"
	"net"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	corelisters "k8s.io/client-go/listers/core/v1"
	discoverylisters "k8s.io/client-go/listers/discovery/v1"
	"k8s.io/client-go/tools/clientcmd"
)

const domain = ".svc.cluster.local."

type server struct {
	services corelisters.ServiceLister
	slices   discoverylisters.EndpointSliceLister
}

func main() {
	kubeconfig := flag.String("kubeconfig", "", "how to reach the API server")
	listen := flag.String("listen", "", "address:port")
	flag.Parse()
	config, err := clientcmd.BuildConfigFromFlags("", *kubeconfig)
	if err != nil {
		log.Fatal(err)
	}
	factory := informers.NewSharedInformerFactory(kubernetes.NewForConfigOrDie(config), 10*time.Minute)
	s := server{factory.Core().V1().Services().Lister(), factory.Discovery().V1().EndpointSlices().Lister()}
	socket, err := net.ListenPacket("udp", *listen)
	if err != nil {
		log.Fatal(err)
	}
	factory.Start(nil)
	factory.WaitForCacheSync(nil)
	for packet := make([]byte, 4096); ; {
		size, from, err := socket.ReadFrom(packet)
		if err != nil {
			log.Fatal(err)
		}
		if reply := s.reply(packet[:size]); reply != nil {
			_, _ = socket.WriteTo(reply, from)
		}
	}
}

func (s server) reply(packet []byte) []byte {
	var parser dnsmessage.Parser
	header, err := parser.Start(packet)
	if err != nil {
		return nil
	}
	question, err := parser.Question()
	if err != nil {
		return nil
	}
	addresses, found := s.resolve(strings.ToLower(question.Name.String()))
	message := dnsmessage.Message{Questions: []dnsmessage.Question{question}, Header: dnsmessage.Header{ID: header.ID, Response: true,
		Authoritative: true, RecursionDesired: header.RecursionDesired, RecursionAvailable: true}}
	if !found {
		message.RCode = dnsmessage.RCodeNameError
	}
	for _, address := range addresses {
		if question.Type == dnsmessage.TypeA {
			message.Answers = append(message.Answers, dnsmessage.Resource{Body: &dnsmessage.AResource{A: address.As4()},
				Header: dnsmessage.ResourceHeader{Name: question.Name, Class: dnsmessage.ClassINET, TTL: 5}})
		}
	}
	reply, err := message.Pack()
	if err != nil {
		return nil
	}
	return reply
}

// resolve splits [HOSTNAME.]SERVICE.NAMESPACE.
func (s server) resolve(name string) (addresses []netip.Addr, found bool) {
	rest, ours := strings.CutSuffix(name, domain)
	parts := strings.Split(rest, ".")
	if !ours || len(parts) < 2 || len(parts) > 3 {
		return nil, false
	}
	namespace, service, hostname := parts[len(parts)-1], parts[len(parts)-2], ""
	if len(parts) == 3 {
		hostname = parts[0]
	}
	entry, err := s.services.Services(namespace).Get(service)
	if err != nil {
		return nil, false
	}
	if entry.Spec.ClusterIP != v1.ClusterIPNone {
		if hostname != "" {
			return nil, false
		}
		return []netip.Addr{netip.MustParseAddr(entry.Spec.ClusterIP)}, true
	}
	slices, _ := s.slices.EndpointSlices(namespace).List(labels.SelectorFromSet(labels.Set{discovery.LabelServiceName: service}))
	for _, slice := range slices {
		for _, endpoint := range slice.Endpoints {
			ready := endpoint.Conditions.Ready == nil || *endpoint.Conditions.Ready // True for all with publishNotReadyAddresses
			if ready && (hostname == "" || (endpoint.Hostname != nil && *endpoint.Hostname == hostname)) {
				addresses = append(addresses, netip.MustParseAddr(endpoint.Addresses[0]))
			}
		}
	}
	return addresses, hostname == "" || len(addresses) > 0
}
