// A server on net/http. Arguments: address and port.
package main

import (
	"log"
	"net"
	"net/http"
	"os"
	"strings"
)

func main() {
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/close":
			w.Header().Set("Connection", "close")
			w.Write([]byte("closing\n"))
		case "/large":
			w.Write([]byte(strings.Repeat("x", 100_000)))
		case "/chunked":
			for i := 0; i < 3; i++ {
				w.Write([]byte("GET / HTTP/1.1\r\nConnection: close\r\n\r\n"))
				w.(http.Flusher).Flush()
			}
		case "/empty":
			w.WriteHeader(http.StatusNoContent)
		default:
			w.Write([]byte("hello\n"))
		}
	})
	listener, err := net.Listen("tcp", net.JoinHostPort(os.Args[1], os.Args[2]))
	if err != nil {
		log.Fatal(err)
	}
	log.Fatal(http.Serve(listener, nil))
}
