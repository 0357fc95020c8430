import com.sun.net.httpserver.HttpExchange;
import com.sun.net.httpserver.HttpServer;
import java.io.IOException;
import java.net.InetSocketAddress;
import java.util.concurrent.Executors;

/** A server on the JDK's HttpServer. Arguments: address and port. */
class Server {
    public static void main(String[] args) throws IOException {
        HttpServer server = HttpServer.create(new InetSocketAddress(args[0], Integer.parseInt(args[1])), 4096);
        server.createContext("/", Server::handle);
        server.setExecutor(Executors.newFixedThreadPool(16));
        server.start();
    }

    private static void handle(HttpExchange exchange) throws IOException {
        exchange.getRequestBody().readAllBytes();
        boolean head = exchange.getRequestMethod().equals("HEAD");
        switch (exchange.getRequestURI().getPath()) {
            case "/empty" -> exchange.sendResponseHeaders(204, -1);
            case "/chunked" -> {
                exchange.sendResponseHeaders(200, head ? -1 : 0);
                if (!head) exchange.getResponseBody().write("hello\n".getBytes());
            }
            case "/close" -> {
                exchange.getResponseHeaders().set("Connection", "close");
                answer(exchange, head, new byte[10]);
            }
            case "/large" -> answer(exchange, head, new byte[100_000]);
            default -> answer(exchange, head, "hello\n".getBytes());
        }
        exchange.close();
    }

    private static void answer(HttpExchange exchange, boolean head, byte[] body) throws IOException {
        exchange.sendResponseHeaders(200, head ? -1 : body.length);
        if (!head) exchange.getResponseBody().write(body);
    }
}
