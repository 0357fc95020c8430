import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse.BodyHandlers;
import java.util.concurrent.CompletableFuture;

/** The JDK's HttpClient: {@code Client URL REQUESTS}, ten at a time; it keeps its connections. */
class Client {
    public static void main(String[] args) {
        HttpClient client = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();
        HttpRequest request = HttpRequest.newBuilder(URI.create(args[0])).build();
        for (int left = Integer.parseInt(args[1]); left > 0; left -= 10) {
            CompletableFuture<?>[] batch = new CompletableFuture<?>[10];
            for (int i = 0; i < batch.length; i++) batch[i] = client.sendAsync(request, BodyHandlers.discarding());
            CompletableFuture.allOf(batch).join();
        }
        System.exit(0);
    }
}
